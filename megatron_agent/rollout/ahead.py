"""Rollouts that run ahead of the trainer: which groups are started when, and which of them a step trains on.

The bound on started groups is AReaL's (arXiv 2505.24298, equation 3), counted in groups; beside it every step waits for
the groups that would be too old in a later one, so that the bound on staleness holds for each token, not on average.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_agent.rollout.collect import Unfinished
from megatron_agent.types import Task, TrajectoryGroup


class GroupSource(Protocol):
    """What rollout/rollouts.py offers to whoever takes groups one by one."""

    def start(self, tasks: list[Task], step: int) -> list[int]: ...

    def go_on(self, group: Unfinished, step: int) -> int: ...

    def unfinished(self) -> dict[int, Unfinished]: ...

    async def next_group(self) -> tuple[int, TrajectoryGroup]: ...


@dataclass(frozen=True)
class Start:
    """When a group was started: after how many updates (its oldest tokens are of that weight version), and for which step its
    seeds were drawn."""

    updates: int
    step: int


@dataclass
class Snapshot:
    """Everything generated and not trained yet; what `RolloutsAhead.restore` goes on from."""

    updates: int
    num_started: int
    finished: list[tuple[Start, TrajectoryGroup]]
    unfinished: list[tuple[Start, Unfinished]]


class RolloutsAhead:
    """consumes: tasks, by `draw`(how many). waits for: groups that finish, in `take`. unblocked by: the end of enough of them,
    or the failure of one. produces: `groups_per_step` groups for each of `num_steps` steps, none with a token that is more
    than `max_staleness` updates old when its step begins.

    Back-pressure: (max_staleness + 1) * groups_per_step groups at most are under way, waiting or being trained on; new ones
    start when a step is committed. 0 is the synchronous loop: a step's groups start when the one before is committed.
    `keep` says whether a group is worth training on; one that is not is replaced, as long as a step has not drawn
    `max_rounds` times its groups. All calls are made on one event loop.
    """

    def __init__(
        self,
        rollouts: GroupSource,
        draw: Callable[[int], list[Task]],
        keep: Callable[[TrajectoryGroup], bool],
        groups_per_step: int,
        max_staleness: int,
        num_steps: int,
        max_rounds: int = 1,
        updates: int = 0,
    ) -> None:
        self._rollouts, self._draw, self._keep = rollouts, draw, keep
        self.groups_per_step, self.max_staleness, self.num_steps = groups_per_step, max_staleness, num_steps
        self._max_replaced = (max_rounds - 1) * groups_per_step  # in one step
        self.updates = updates
        self._num_started = updates * groups_per_step  # of which step a group's seeds are; less those that were replaced
        self._num_replaced = 0
        self._started: dict[int, Start] = {}  # by number; all that are not committed
        self._finished: dict[int, TrajectoryGroup] = {}
        self._taken: list[int] = []
        self._refused: list[TrajectoryGroup] = []
        self._num_reported = 0  # of those, by the last take
        self._arrived = asyncio.Event()
        self._receiving: asyncio.Task[None] | None = None

    @property
    def num_finished(self) -> int:
        """Groups that wait for a step."""
        return len(self._finished) - len(self._taken)

    @property
    def num_under_way(self) -> int:
        return len(self._started) - len(self._finished)

    async def take(self) -> tuple[list[TrajectoryGroup], list[TrajectoryGroup]]:
        """The groups of the next step, in the order of their start, and those refused since the last one. Fewer than
        `groups_per_step` when the rest was refused. Raises what an episode raised; nothing that is finished is lost by it.

        They stay in the queue, and in its snapshots, until `commit`. A take that was cancelled may be called again.
        """
        self._taken = []
        self.fill()
        while not self._is_enough():
            assert self._receiving is not None
            self._arrived.clear()
            arrival = asyncio.ensure_future(self._arrived.wait())
            try:
                await asyncio.wait((arrival, self._receiving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                arrival.cancel()
            if self._receiving.done():
                self._receiving.result()
        oldest_first = sorted(self._finished, key=lambda number: (self._started[number].updates, number))
        self._taken = oldest_first[: self.groups_per_step]
        self._num_reported = len(self._refused)
        return [self._finished[number] for number in self._taken], list(self._refused)

    def commit(self) -> None:
        """The step was trained on and its weights are in the engines: its groups are gone, and new ones start."""
        for number in self._taken:
            del self._started[number], self._finished[number]
        del self._refused[: self._num_reported]
        self._taken, self._num_reported, self._num_replaced = [], 0, 0
        self.updates += 1
        self.fill()

    def fill(self) -> None:
        """Start what may be under way now."""
        room = (self.max_staleness + 1) * self.groups_per_step - len(self._started)
        left = (self.num_steps - self.updates) * self.groups_per_step - len(self._started)
        for _ in range(min(room, left)):
            self._start_one()
        if self.num_under_way and (self._receiving is None or (self._receiving.done() and not self._receiving.exception())):
            self._receiving = asyncio.create_task(self._receive())

    async def close(self) -> None:
        """Stop receiving; the episodes themselves are the rollouts' to cancel."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)

    def snapshot(self) -> Snapshot:
        """As of now, without a wait in between. What was taken and not committed is in it."""
        finished = [(self._started[number], group) for number, group in sorted(self._finished.items())]
        unfinished = [(self._started[number], group) for number, group in sorted(self._rollouts.unfinished().items())]
        return Snapshot(self.updates, self._num_started, finished, unfinished)

    def restore(self, snapshot: Snapshot) -> None:
        """Into a new queue, before the first `take`: finished groups are not generated again, those under way go on from their
        finished trajectories; an episode that was in its middle starts again."""
        if snapshot.updates != self.updates:
            raise ValueError(f"a queue of {snapshot.updates} updates cannot go on after {self.updates}")
        for number, (start, group) in enumerate(snapshot.finished, start=-len(snapshot.finished)):
            self._started[number], self._finished[number] = start, group
        for start, unfinished in snapshot.unfinished:
            self._started[self._rollouts.go_on(unfinished, start.step)] = start
        self._num_started = max(self._num_started, snapshot.num_started)

    def _start_one(self) -> None:
        start = Start(self.updates, self._num_started // self.groups_per_step + 1)
        (number,) = self._rollouts.start(self._draw(1), start.step)
        self._started[number] = start
        self._num_started += 1

    async def _receive(self) -> None:
        while self.num_under_way:
            number, group = await self._rollouts.next_group()
            if self._keep(group):
                self._finished[number] = group
            else:
                self._refuse(number, group)
            self._arrived.set()

    def _refuse(self, number: int, group: TrajectoryGroup) -> None:
        del self._started[number]
        self._refused.append(group)
        if self._num_replaced < self._max_replaced:
            self._num_replaced += 1
            self._num_started -= 1
            self._start_one()

    def _is_enough(self) -> bool:
        """Whether a step can be filled so that no later one is left with a group that is too old for it: of those that must
        be trained on within the next j + 1 steps, this one included, at most j * groups_per_step may be left after it."""
        if not self.num_under_way:
            return True
        if self.num_finished < self.groups_per_step:
            return False
        for later in range(self.max_staleness + 1):
            newest = self.updates - self.max_staleness + later
            there = [number for number, start in self._started.items() if start.updates <= newest]
            finished = sum(number in self._finished for number in there)
            if finished < len(there) - later * self.groups_per_step:
                return False
        return True


def to_bytes(snapshot: Snapshot, stream: dict[str, Any]) -> bytes:
    """`stream`: the state of the tasks' stream at the same moment."""
    return pickle.dumps((snapshot, stream), protocol=pickle.HIGHEST_PROTOCOL)


def from_bytes(data: bytes) -> tuple[Snapshot, dict[str, Any]]:
    """Of bytes that this program wrote itself: unpickling runs what it is told to."""
    return pickle.loads(data)
