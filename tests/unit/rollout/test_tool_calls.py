"""Deadlines, places and threads of tool calls. Not covered: a process that ends while a late call runs (daemon threads)."""

import asyncio
import sys
import threading
import time

import pytest

from megatron_agent.envs.base import PictureTool, ToolBase
from megatron_agent.errors import EnvError
from megatron_agent.rollout.tool_calls import ToolDeadlineError, ToolRunner


class Session:
    def __init__(self, tool=None):
        self.tool = tool or ToolBase()


def run(main):
    return asyncio.run(main())


def test_the_clock_starts_with_the_place():
    async def main():
        tools = ToolRunner(concurrent_workers=1, timeout_s=0.3)
        return await asyncio.gather(*(tools.call(Session(), time.sleep, 0.1) for _ in range(6)))

    assert run(main) == [None] * 6


def test_no_more_than_the_places_at_once():
    lock, running, most = threading.Lock(), 0, 0

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async def main():
        tools = ToolRunner(2, 5)
        await asyncio.gather(*(tools.call(Session(), work) for _ in range(8)))

    run(main)
    assert most == 2


def test_hung_tools_keep_nobody_waiting(caplog):
    hang = threading.Event()

    async def main():
        tools = ToolRunner(concurrent_workers=1, timeout_s=0.05)
        hung = [Session(), Session()]
        late = await asyncio.gather(*(tools.call(s, hang.wait) for s in hung), return_exceptions=True)
        assert all(isinstance(error, ToolDeadlineError) for error in late)
        assert await tools.call(Session(), lambda: threading.current_thread().daemon)
        with pytest.raises(EnvError, match="busy"):
            await tools.call(hung[0], lambda: 1)
        hang.set()
        await asyncio.sleep(0.05)
        return await tools.call(hung[0], lambda: 1)

    assert run(main) == 1
    assert "2 late calls still run" in caplog.text


def test_an_answer_after_the_end_is_thrown_away():
    hang = threading.Event()

    async def main():
        with pytest.raises(ToolDeadlineError, match=r"0\.02 s"):
            await ToolRunner(1, 0.02).call(Session(), hang.wait)

    run(main)
    hang.set()
    for thread in threading.enumerate():
        if thread.name == "tool":
            thread.join(1)


@pytest.mark.parametrize(("raised", "seen"), [(KeyError("x"), KeyError), (StopIteration(), RuntimeError)])
def test_errors_come_through(raised, seen):
    def work():
        raise raised

    with pytest.raises(seen):
        run(lambda: ToolRunner(1, 1).call(Session(), work))


def test_a_tool_cannot_end_the_program():
    with pytest.raises(EnvError, match="SystemExit"):
        run(lambda: ToolRunner(1, 1).call(Session(), sys.exit, 1))


def test_inline_tools_get_no_thread():
    async def main():
        tools = ToolRunner(1, 0.01)
        return await tools.call(Session(PictureTool()), threading.current_thread)

    assert run(main) is threading.main_thread()
