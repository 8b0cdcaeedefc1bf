"""The order in which training tasks are drawn: fixed by the seed, kept in the driver alone, resumed exactly.

No worker takes part in it, so it does not depend on how many there are. All states are plain values, for a checkpoint.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import Task

State = dict[str, Any]


@dataclass
class MixPart:
    """Files that are shuffled together. `weight` is their share of the prompts among the parts that take part in a step.

    Steps count from 1, both ends included, and are counted in prompts: of `training.prompts_per_step` drawn ones each.
    """

    files: list[str] = field(default_factory=list)
    weight: float = 1.0
    from_step: int = 1
    until_step: int = 0  # 0: to the end
    num_epochs: int = 0  # how often every row is drawn, then the part is through; 0: without end

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("a part of data.mix has no files")
        if len(set(self.files)) < len(self.files):
            raise ConfigError(f"a part of data.mix names a file twice: {', '.join(self.files)}; give it a weight instead")
        if not self.weight > 0:
            raise ConfigError(f"data.mix: the weight of {self.files[0]} is {self.weight}; it must be above 0")
        if self.from_step < 1 or self.num_epochs < 0 or (self.until_step and self.until_step < self.from_step):
            raise ConfigError(
                f"data.mix: {self.files[0]} has from_step={self.from_step}, until_step={self.until_step}, num_epochs="
                f"{self.num_epochs}; steps count from 1, until_step is 0 (to the end) or not before from_step, and "
                f"num_epochs is 0 (without end) or more"
            )

    def takes_part(self, step: int) -> bool:
        return self.from_step <= step and (not self.until_step or step <= self.until_step)


def check_mix(parts: Sequence[MixPart], curriculum: bool) -> None:
    """Raises ConfigError where a step could find no part to draw from, or where what is given would have no effect."""
    if curriculum:
        for part in parts:
            if part.weight != 1 or part.from_step != 1 or part.until_step:
                raise ConfigError(
                    f"data.mix: {part.files[0]} has a weight or steps; with data.curriculum a part comes when the one before "
                    f"it is through its num_epochs"
                )
        if parts and parts[-1].num_epochs:
            raise ConfigError("data.mix: the last part of a curriculum goes on without end; leave out its num_epochs")
        return
    endless = [part for part in parts if not part.num_epochs]
    for step in sorted({1, *(part.until_step + 1 for part in endless if part.until_step)}) if parts else []:
        if not any(part.takes_part(step) for part in endless):
            raise ConfigError(
                f"data.mix: no part without num_epochs takes part in step {step}; give one whose steps cover it, or "
                f"data.curriculum=true for parts that follow one another"
            )


class TaskStream:
    """Tasks without end: every epoch is a permutation of its own.

    The order comes from Python's `random`, whose shuffle is stable over versions. Raises DataError: no tasks.
    """

    def __init__(self, tasks: Sequence[Task], seed: int | str, shuffle: bool = True) -> None:
        if not tasks:
            raise DataError("a stream needs at least one task")
        self._tasks, self._seed, self._shuffle = tasks, seed, shuffle
        self._fingerprint = fingerprint(tasks)
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def num_full_epochs(self) -> int:
        """How often every task has been drawn."""
        return self._epoch + (self._position == len(self._order))

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks; may run over into following epochs."""
        batch: list[Task] = []
        while len(batch) < n:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            taken = self._order[self._position : self._position + n - len(batch)]
            self._position += len(taken)
            batch += [self._tasks[index] for index in taken]
        return batch

    def state(self) -> State:
        return {
            "epoch": self._epoch, "position": self._position, "seed": self._seed, "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
        }  # fmt: skip

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken. Raises DataError where the tasks, the seed or the shuffling have changed."""
        _check_unchanged(state, self.state(), ("fingerprint", "seed", "shuffle"))
        self._start_epoch(int(state["epoch"]))
        self._position = int(state["position"])

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = list(range(len(self._tasks)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)


class TaskMix:
    """Several TaskStreams drawn from by weight or one after another. Which one comes next is no matter of chance.

    Smooth weighted round-robin: every part that takes part earns its weight, the richest is drawn from and pays for all.
    With the same parts taking part, what was drawn from one stays within a few prompts of its share at any time.
    Raises DataError: a part without tasks.
    """

    def __init__(
        self,
        parts: Sequence[MixPart],
        tasks_of_parts: Sequence[Sequence[Task]],
        seed: int,
        prompts_per_step: int,
        shuffle: bool = True,
        curriculum: bool = False,
    ) -> None:
        if empty := [part for part, tasks in zip(parts, tasks_of_parts, strict=True) if not tasks]:
            raise DataError(f"data.mix: no usable row in {', '.join(empty[0].files)}")
        self._parts, self._prompts_per_step, self._curriculum = list(parts), prompts_per_step, curriculum
        self._streams = [TaskStream(tasks, f"{seed}/part{i}", shuffle) for i, tasks in enumerate(tasks_of_parts)]
        self._credits = [0.0] * len(self._streams)
        self._num_drawn = 0

    @property
    def epoch(self) -> int:
        """How often every task of every part has been drawn."""
        return min(stream.num_full_epochs for stream in self._streams)

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks, in the order in which they are drawn."""
        return [self._next() for _ in range(n)]

    def state(self) -> State:
        plan = [{name: value for name, value in asdict(part).items() if name != "files"} for part in self._parts]
        return {
            "parts": [stream.state() for stream in self._streams], "credits": list(self._credits),
            "num_drawn": self._num_drawn, "prompts_per_step": self._prompts_per_step, "curriculum": self._curriculum,
            "mix": plan,
        }  # fmt: skip

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken. Raises DataError where tasks, seed, shuffling, weights or steps have changed."""
        _check_unchanged(state, self.state(), ("mix", "curriculum", "prompts_per_step"))
        for stream, of_part in zip(self._streams, state["parts"], strict=True):
            stream.load_state(of_part)
        self._credits, self._num_drawn = [float(credit) for credit in state["credits"]], int(state["num_drawn"])

    def _next(self) -> Task:
        active = self._active()
        for index, part in enumerate(self._parts):
            self._credits[index] = self._credits[index] + part.weight if index in active else 0.0
        chosen = max(active, key=lambda index: (self._credits[index], -index))
        self._credits[chosen] -= sum(self._parts[index].weight for index in active)
        self._num_drawn += 1
        return self._streams[chosen].next(1)[0]

    def _active(self) -> list[int]:
        step = self._num_drawn // self._prompts_per_step + 1
        if self._curriculum:
            through = [s.num_full_epochs >= (p.num_epochs or 1) for p, s in zip(self._parts, self._streams)]
            return [next((i for i, is_through in enumerate(through[:-1]) if not is_through), len(through) - 1)]
        return [
            index
            for index, (part, stream) in enumerate(zip(self._parts, self._streams))
            if part.takes_part(step) and not (part.num_epochs and stream.num_full_epochs >= part.num_epochs)
        ]


def fingerprint(tasks: Sequence[Task]) -> str:
    """Of what is asked, shown and expected, in order: other files, rows or filters give another one."""
    digest = hashlib.sha256()
    for task in tasks:
        sources = [ref.source for ref in task.images]
        digest.update(repr((task.task_id, task.question, task.ground_truth, task.env_name, sources)).encode())
    return digest.hexdigest()[:16]


def _check_unchanged(state: State, own: State, names: Sequence[str]) -> None:
    if changed := [f"{name} was {state.get(name)!r}, is {own[name]!r}" for name in names if state.get(name) != own[name]]:
        raise DataError(f"the data order cannot be resumed: {'; '.join(changed)}. Use the same files, rows, seed and data.mix")
