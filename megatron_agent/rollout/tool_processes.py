"""Processes for tools that compute for long, or that may take the whole process down with them.

A process keeps nothing between calls: the session travels to it and its state comes back, so that any process serves any
call and a killed one loses only the call that killed it; the session goes on from the state before. One that is late is
ended, for good, as no thread can be.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megatron_agent.errors import EnvError

if TYPE_CHECKING:
    from megatron_agent.envs.base import EnvSession

START_TIMEOUT_S = 120.0  # of the interpreter and its imports; a call's own deadline begins afterwards


class ToolDeadlineError(EnvError):
    """A tool did not answer in time; what it does from then on is thrown away."""


class ToolProcesses:
    """consumes: calls of sessions, each in a thread of its own. waits for: the process that carries out the call.

    unblocked by: its answer, its death, or `timeout_s`. produces: the answer. Processes are started when there is no idle
    one, as many as there are calls at once, and end with this process.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._idle: list[_Process] = []

    def call(self, session: EnvSession, method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """`method(*arguments)` on a copy of `session`, whose state `session` then takes over; what it raises is raised.

        Raises ToolDeadlineError, and EnvError when the process died or the session cannot be pickled.
        """
        try:
            request = pickle.dumps((session, method, arguments))
        except Exception as error:  # noqa: BLE001 - foreign objects raise anything
            raise EnvError(f"the tool's state cannot go to a process: {error!r}") from None
        try:  # other threads call too
            process = self._idle.pop()
        except IndexError:
            process = _Process()
        try:
            answer = process.ask(request, self.timeout_s)
        except BaseException:
            process.end()
            raise
        self._idle.append(process)
        result, raised, state = pickle.loads(answer)
        if raised is not None:
            raise raised
        vars(session).update(state)
        return result

    def close(self) -> None:
        while self._idle:
            self._idle.pop().end()


class _Process:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: its children would import the program's main module once more.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_agent.rollout.tool_processes", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._connection = Connection(ours.detach())
        self._is_ready = False

    def ask(self, request: bytes, timeout_s: float) -> bytes:
        try:
            if not self._is_ready:
                self._receive(START_TIMEOUT_S)
                self._is_ready = True
            self._connection.send_bytes(request)
            return self._receive(timeout_s)
        except (OSError, EOFError) as error:
            raise EnvError(f"the tool's process ended with {self._exit_status()} in the middle of the call") from error

    def _receive(self, timeout_s: float) -> bytes:
        if not self._connection.poll(timeout_s):
            raise ToolDeadlineError(f"the tool did not answer within {timeout_s:g} s")
        return self._connection.recv_bytes()

    def _exit_status(self) -> int | None:
        try:
            return self._process.wait(1)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def serve(descriptor: int) -> None:
    """In the process: carry out calls until the other side is gone."""
    import megatron_agent.envs.base  # noqa: F401 - what every call needs

    connection = Connection(descriptor)
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(request))


def _answer(request: bytes) -> bytes:
    try:
        session, method, arguments = pickle.loads(request)
        answer: tuple[Any, Exception | None, dict[str, Any]]
        answer = method(*arguments), None, {name: value for name, value in vars(session).items() if name != "store"}
    except Exception as error:  # noqa: BLE001 - foreign code; the caller sorts it
        answer = None, error, {}
    try:
        return pickle.dumps(answer)
    except Exception as error:  # noqa: BLE001 - foreign objects raise anything
        why = EnvError(f"what the tool returned, raised or keeps cannot leave its process: {error!r}")
        return pickle.dumps((None, why, {}))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
