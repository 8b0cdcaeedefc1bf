"""What a run remembers between steps and across restarts, and how it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_agent.errors import CheckpointError, StopRequested
from megatron_agent.training.checkpoint import STATE_FILE, complete_checkpoints, read_state
from megatron_agent.types import Trajectory

if TYPE_CHECKING:
    from megatron_agent.config import RunConfig
    from megatron_agent.observe.boards import Boards
    from megatron_agent.stages import Stages

log = logging.getLogger("megatron_agent")
T = TypeVar("T")
SHOWN_EPISODES = 12


class StopSignal:
    """Turns SIGTERM and SIGINT into an orderly end; the second one of a kind acts as usual."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.warning("%s: stopping after the work that cannot be cut", number.name)
        self._event.set()
        asyncio.get_running_loop().remove_signal_handler(number)

    async def or_done(self, work: Awaitable[T], what: str, boards: Boards, beside: asyncio.Task | None = None) -> T:
        """The result of `work`, or StopRequested as soon as a signal has come (`work` is cancelled then).

        `beside` is other work under way: when it fails, its error is raised at once.
        """
        boards.status(what)
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._event.wait())
        waiting = {task, stopped} if beside is None else {task, stopped, beside}
        try:
            if self._event.is_set():  # it came during work that cannot be cut; this may end without a wait
                raise StopRequested(f"stopped by a signal before: {what}")
            while not task.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if beside in done:
                    beside.result()
                if stopped in done and not task.done():
                    raise StopRequested(f"stopped by a signal during: {what}")
            return task.result()
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


@dataclass
class Progress:
    """How far the run is; all of it but the trajectories is saved with every checkpoint."""

    step: int = 0
    stream: dict[str, Any] = field(default_factory=dict)
    weight_version: int = 0
    algorithm: dict[str, Any] = field(default_factory=dict)  # name of the algorithm -> its state
    alarms: dict[str, Any] = field(default_factory=dict)
    num_trajectories: int = 0
    seconds_setup: float = 0.0
    seconds_train: float = 0.0
    seconds_evaluation: float = 0.0
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    episodes: dict[str, list[Trajectory]] = field(default_factory=dict, repr=False)
    is_updating: bool = False  # the trainer's weights are not those of `step`

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds_setup`, `seconds_train` or `seconds_evaluation`."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - began_s)

    @staticmethod
    def last(config: RunConfig) -> Progress | None:
        """Of the newest complete checkpoint, when `resume` is auto and there is one. Raises CheckpointError."""
        saved = complete_checkpoints(config.folder / "checkpoints") if config.resume == "auto" else []
        if not saved:
            return None
        state = read_state(saved[-1])
        try:
            return Progress(**state)
        except TypeError as error:
            raise CheckpointError(f"{saved[-1] / STATE_FILE}: not what this version writes: {error}") from error

    async def restore(self, parts: Stages) -> None:
        """Weights, optimizer, random states, data order, the algorithm's state and the weight version as they were."""
        saved = complete_checkpoints(parts.config.folder / "checkpoints")
        if not saved:
            return  # a new run without a warm start
        folder = saved[-1]
        await parts.learner.load(folder)
        parts.weights.version = max(0, self.weight_version - 1)  # the sync that follows stamps the same version again
        if parts.data.train is not None and self.stream:
            parts.data.train.load_state(self.stream)
        if (name := parts.config.algorithm_name) in self.algorithm:
            parts.algorithm.load_state(self.algorithm[name])
        parts.alarms.load_state(self.alarms)
        log.info("resumed from %s (step %d)", folder, self.step)

    async def save(self, parts: Stages, wait: bool = False) -> None:
        """A checkpoint of the last finished step (0: the warm start), complete on return with `wait`; nothing is done when
        there is one. Raises CheckpointError, also of the save before."""
        if self.is_updating:
            log.warning("step %d was cut in the middle: it is not in a checkpoint", self.step + 1)
            return await parts.checkpoints.finish(parts.learner)
        state = {name: value for name, value in vars(self).items() if name not in ("episodes", "is_updating")}
        await parts.checkpoints.save(parts.learner, state, wait)

    async def keep_best(self, parts: Stages, metrics: dict[str, float]) -> None:
        """Save the last finished step if the evaluation of it was the best so far. `metrics`: by "heldout/accuracy" etc."""
        if parts.checkpoints.is_best(metrics):
            await self.save(parts)
            await parts.checkpoints.mark_best(self.step, metrics)

    def finish_step(self, step: int, parts: Stages, num_trajectories: int) -> None:
        self.step, self.weight_version, self.is_updating = step, parts.weight_version, False
        self.num_trajectories += num_trajectories
        self.algorithm = {parts.config.algorithm_name: parts.algorithm.state()}
        if parts.data.train is not None:
            self.stream = dict(parts.data.train.state())

    def keep_evaluation(self, when: str, name: str, metrics: dict[str, float], trajectories: list[Trajectory]) -> None:
        if when in ("before", "after"):
            getattr(self, when)[name] = metrics
            self.episodes[f"{when}/{name}"] = trajectories[:SHOWN_EPISODES]


def keep_old_run(folder: Path) -> None:
    """Move an earlier run of the same name aside (name.1, name.2, ...): a new one must not mix with or erase it."""
    if not any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "ahead")):
        return
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
    aside = folder.with_name(f"{folder.name}.{number}")
    os.replace(folder, aside)
    log.info("an earlier run is kept in %s", aside)
