"""Tools in processes of their own: state, death, deadline, and an episode that goes through all of it."""

import asyncio
import os
import signal
import threading
import time
from typing import ClassVar

import pytest

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import EnvSession, ToolBase
from megatron_agent.errors import EnvError
from megatron_agent.rollout.agent_loop import AgentConfig, run_episode
from megatron_agent.rollout.generation import Sampling
from megatron_agent.rollout.scripted import scripted_generate
from megatron_agent.rollout.tool_calls import ToolDeadlineError, ToolRunner
from megatron_agent.types import Status, Task


class Counter(ToolBase):
    """Counts its calls in its own state; does what the action says."""

    name = "counter"
    workers: ClassVar[str] = "process"

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
        self.count = 0

    def execute(self, action_string, **kwargs):
        self.count += 1
        if "kill" in action_string:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in action_string:
            time.sleep(60)
        if "red" in action_string:
            return None, float(self.count), True, {}
        return f"{self.count} {os.getpid()}", 0.0, False, {}


class Session:
    tool = Counter()

    def __init__(self):
        self.value = 0

    def add(self, number):
        self.value += number
        return self.value, os.getpid()

    def fails(self):
        self.value = 99
        raise KeyError("no such thing")

    def keeps_a_lock(self):
        self.lock = threading.Lock()


def test_state_comes_back_and_the_process_is_kept():
    async def main():
        tools, session = ToolRunner(2, 30), Session()
        try:
            first, process = await tools.call(session, session.add, 2)
            second, again = await tools.call(session, session.add, 3)
            assert (first, second, session.value) == (2, 5, 5)
            assert process == again != os.getpid()
            with pytest.raises(KeyError, match="no such thing"):
                await tools.call(session, session.fails)
            with pytest.raises(EnvError, match="lock"):
                await tools.call(session, session.keeps_a_lock)
            with pytest.raises(EnvError, match="cannot go to a process"):
                await tools.call(session, lambda: None)
            assert session.value == 5
        finally:
            tools.processes.close()
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

    asyncio.run(main())


@pytest.mark.fault
def test_an_episode_outlives_a_killed_and_a_stuck_process(renderer, tmp_path):
    """The state is that of before the call that failed: the count stays at 1."""
    question = {"role": "user", "content": "what color is it ?"}
    task = Task("t0", "unit", (question,), (), "counter", "red", "", script=("zoom", "kill", "hang", "zoom", "red"))
    limits = PixelLimits(784, 1 << 20)
    session, agent = EnvSession(Counter(), ImageStore(tmp_path, limits), limits), AgentConfig(max_turns=5)

    async def main():
        tools = ToolRunner(1, 4.0)
        try:
            return await run_episode(
                task, 0, scripted_generate(task, renderer), renderer, lambda _: session, agent, Sampling(), 4096, tools
            )
        finally:
            tools.processes.close()

    trajectory = asyncio.run(main())
    assert trajectory.status is Status.ANSWERED
    first, killed, stuck, second, _ = (turn.observation_text for turn in trajectory.turns)
    assert first.split()[0] == "1" and second.split()[0] == "2"
    assert "ended with -9" in killed and "did not answer within 4 s" in stuck
    assert first.split()[1] != second.split()[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(first.split()[1]), 0)
    assert trajectory.process_reward == 3.0


@pytest.mark.fault
def test_a_late_call_says_so():
    async def main():
        tools, session = ToolRunner(1, 0.2), Session()
        try:
            with pytest.raises(ToolDeadlineError, match=r"0\.2 s"):
                await tools.call(session, time.sleep, 60)
        finally:
            tools.processes.close()

    asyncio.run(main())
