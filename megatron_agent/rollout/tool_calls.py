"""Calls of tools that wait, hang or never return: each in a thread of its own, so many at once, each with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from megatron_agent.errors import EnvError
from megatron_agent.rollout.tool_processes import ToolDeadlineError, ToolProcesses

if TYPE_CHECKING:
    from megatron_agent.envs.base import EnvSession

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ToolRunner:
    """consumes: calls of sessions' tools. waits for: one of `concurrent_workers` places, then the tool.

    unblocked by: the tool's answer, or `timeout_s` after the place was got. produces: the answer. A thread cannot be
    stopped: a late call gives its place up and runs on in a daemon thread, which keeps neither another call nor the
    program's exit waiting; its session takes no other call meanwhile. Serves one event loop. A tool with `runs_inline`
    is called at once on the event loop, without place, thread or deadline; one whose `workers` are "process" in a process
    beside, which is ended when the call is late (tool_processes.py).
    """

    def __init__(self, concurrent_workers: int, timeout_s: float) -> None:
        self.timeout_s, self.processes = timeout_s, ToolProcesses(timeout_s)
        self._places = asyncio.Semaphore(concurrent_workers)
        self._abandoned: set[EnvSession] = set()  # their late calls still run

    async def call(self, session: EnvSession, method: Callable[..., T], *arguments: Any) -> T:
        """`method(*arguments)`, a method of `session`; what it raises is raised here.

        Raises ToolDeadlineError when it is late, EnvError while an earlier call of the session still runs.
        """
        if session.tool.runs_inline:
            return method(*arguments)
        if session in self._abandoned:
            raise EnvError("the tool is still busy with an earlier call")
        timeout_s: float | None = self.timeout_s
        if session.tool.workers == "process":  # which has an eye on its own deadline
            method, arguments, timeout_s = self.processes.call, (session, method, arguments), None
        async with self._places:
            answer: asyncio.Future[tuple[T | None, BaseException | None]] = asyncio.get_running_loop().create_future()
            call = threading.Thread(target=_answer, args=(answer, method, arguments), name="tool", daemon=True)
            try:
                call.start()
            except RuntimeError as error:  # too many late calls have taken all threads that the system gives
                raise EnvError(f"the tool could not be called: {error}") from error
            await asyncio.wait({answer}, timeout=timeout_s)
        if not answer.done():
            self._abandoned.add(session)
            answer.add_done_callback(lambda _: self._abandoned.discard(session))
            logger.warning("a call of tool %s passed its deadline of %g s; %d late calls still run",
                           session.tool.name, self.timeout_s, len(self._abandoned))  # fmt: skip
            raise ToolDeadlineError(f"the tool did not answer within {self.timeout_s:g} s")
        result, raised = answer.result()
        if isinstance(raised, Exception):
            raise raised
        if raised is not None:  # SystemExit and its like would end the run
            raise EnvError(f"the tool raised {raised!r}")
        return cast("T", result)


def _answer(answer: asyncio.Future, method: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the call's thread: carry it out and tell the event loop, if that still runs."""
    result, error = None, None
    try:
        result = method(*arguments)
    except BaseException as raised:  # noqa: BLE001 - foreign code; the caller sorts it
        error = raised
    with contextlib.suppress(RuntimeError):  # the loop was closed: the answer came after the end of the run
        answer.get_loop().call_soon_threadsafe(_deliver, answer, result, error)


def _deliver(answer: asyncio.Future, result: object, error: BaseException | None) -> None:
    if not answer.done():
        answer.set_result((result, error))
