"""Tasks -> groups of scored trajectories. Every trajectory is a task of its own: nobody waits for a turn of another."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from megatron_agent.rewards.base import RewardBase, iou, target_box
from megatron_agent.types import LossUse, RewardParts, Status, Task, Trajectory, TrajectoryGroup, Unscored

RunOne: TypeAlias = Callable[[Task, int], Awaitable[Trajectory]]
ACCURACY_PART = "accuracy"
PENALTY_PART = "status_penalty"
LOOP_TOKENS, LOOP_PERIOD = 32, 8


def trajectory_seed(run_seed: int, step: int, task_id: str, sample_index: int) -> int:
    """A sampling seed in [0, 2**31) that depends on nothing but its arguments, on any machine."""
    name = f"{run_seed}|{step}|{task_id}|{sample_index}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "little") & 0x7FFFFFFF


@dataclass
class Unfinished:
    """A group under way: its task and those of its trajectories that are there, scored."""

    task: Task
    trajectories: list[Trajectory] = field(default_factory=list)


class Collection:
    """Groups under way, started at any time and taken as they finish.

    consumes: `run_one(task, sample_index)`, one episode. waits for: episodes, `max_in_flight` at a time, started in order,
    and each one's score; scoring does not hold a place, so a slow judge starves no engine. unblocked by: the end of any
    episode. produces: groups. Serves one event loop; `cancel` when what is left is not wanted.
    """

    def __init__(self, reward: RewardBase, max_in_flight: int) -> None:
        self._reward, self._places = reward, asyncio.Semaphore(max_in_flight)
        self._numbers = itertools.count()
        self._groups: dict[asyncio.Task[TrajectoryGroup], tuple[int, list[asyncio.Task[Trajectory]]]] = {}
        self._tasks: dict[int, Task] = {}
        self._ended = asyncio.Event()

    def __len__(self) -> int:
        return len(self._groups)

    def start(self, tasks: Sequence[Task], num_samples: int, run_one: RunOne) -> list[int]:
        """`num_samples` scored trajectories of every task -> the groups' numbers in the order of their start."""
        return [self.go_on(Unfinished(task), num_samples, run_one) for task in tasks]

    def go_on(self, group: Unfinished, num_samples: int, run_one: RunOne) -> int:
        """As `start`, of a group some of whose trajectories are there already."""
        known = {trajectory.sample_index: trajectory for trajectory in group.trajectories}

        async def episode(index: int) -> Trajectory:
            return known[index] if index in known else await self._episode(group.task, index, run_one)

        episodes = [asyncio.create_task(episode(index)) for index in range(num_samples)]
        together, number = asyncio.create_task(_together(group.task, episodes)), next(self._numbers)
        together.add_done_callback(lambda _: self._ended.set())
        self._groups[together], self._tasks[number] = (number, episodes), group.task
        return number

    async def next(self) -> tuple[int, TrajectoryGroup]:
        """The next group to finish, started before or during the call, and its number. Raises what one of its episodes raised;
        such a group stays, for `unfinished`."""
        while (done := next((group for group in self._groups if group.done()), None)) is None:
            self._ended.clear()
            await self._ended.wait()
        group = done.result()
        number, _ = self._groups.pop(done)
        del self._tasks[number]
        return number, group

    def unfinished(self) -> dict[int, Unfinished]:
        """What is under way, by number, with the trajectories that are there."""
        return {
            number: Unfinished(self._tasks[number], [e.result() for e in episodes if e.done() and not _failed(e)])
            for number, episodes in self._groups.values()
        }

    async def cancel(self) -> None:
        """No episode outlives it, and no request of theirs."""
        groups = list(self._groups)
        self._groups.clear()
        self._tasks.clear()
        for group in groups:
            group.cancel()
        await asyncio.gather(*groups, return_exceptions=True)

    async def _episode(self, task: Task, sample_index: int, run_one: RunOne) -> Trajectory:
        async with self._places:
            trajectory = await run_one(task, sample_index)
        await _score(trajectory, self._reward)
        return trajectory


def _failed(episode: asyncio.Task[Trajectory]) -> bool:
    return episode.cancelled() or episode.exception() is not None


async def _together(task: Task, episodes: list[asyncio.Task[Trajectory]]) -> TrajectoryGroup:
    try:
        return TrajectoryGroup(task, list(await asyncio.gather(*episodes)))
    except BaseException:  # cancelled or failed alike
        for episode in episodes:
            episode.cancel()
        await asyncio.gather(*episodes, return_exceptions=True)
        raise


async def collect(
    tasks: Sequence[Task], num_samples: int, run_one: RunOne, reward: RewardBase, max_in_flight: int
) -> list[TrajectoryGroup]:
    """All groups, in the order of `tasks`. The first exception cancels all other episodes and is raised."""
    collection = Collection(reward, max_in_flight)
    collection.start(tasks, num_samples, run_one)
    try:
        numbered = [await collection.next() for _ in tasks]
    finally:
        await collection.cancel()
    return in_order(numbered)


def in_order(numbered: list[tuple[int, TrajectoryGroup]]) -> list[TrajectoryGroup]:
    return [group for _, group in sorted(numbered, key=lambda pair: pair[0])]


async def _score(trajectory: Trajectory, reward: RewardBase) -> None:
    if trajectory.status is Status.ENGINE_LOST:
        trajectory.reward = Unscored("its request was lost")
        return
    trajectory.reward = await reward.score(trajectory, trajectory.task)
    if isinstance(trajectory.reward, Unscored) and trajectory.status is not Status.ABORTED:
        trajectory.status = Status.UNSCORED


def weigh_end(trajectory: Trajectory, use: LossUse, penalty: float) -> None:
    """Note what a scored trajectory's end means to the loss; a penalty is a part of its reward, `status_penalty`."""
    trajectory.loss_use = use
    reward = trajectory.reward
    if use is LossUse.PENALISE and isinstance(reward, RewardParts):
        trajectory.reward = RewardParts(reward.parts | {PENALTY_PART: -penalty}, reward.weights | {PENALTY_PART: 1.0})


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Means over the trajectories of a step; rewards over the scored ones, tools over those of tasks that have one."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if not trajectories:
        return {}
    metrics = _reward_metrics(trajectories)
    metrics["response_tokens"] = statistics.fmean(t.num_response_tokens for t in trajectories)
    metrics["response_turns"] = statistics.fmean(len(t.turns) for t in trajectories)
    metrics["response_seconds"] = statistics.fmean(t.seconds for t in trajectories)
    for status in Status:
        metrics[f"status/{status.value}"] = sum(t.status is status for t in trajectories) / len(trajectories)
    metrics["repeated_fraction"] = sum(ends_in_loop(t) for t in trajectories) / len(trajectories)
    metrics |= _group_metrics(groups)
    return metrics | _tool_metrics([t for t in trajectories if t.task.env_name])


def ends_in_loop(trajectory: Trajectory) -> bool:
    """Whether its last LOOP_TOKENS generated tokens are one cycle of LOOP_PERIOD tokens at most, over and over."""
    tail = trajectory.turns[-1].token_ids[-LOOP_TOKENS:] if trajectory.turns else []
    if len(tail) < LOOP_TOKENS:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1))


def _group_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """The share of groups, of those with two scored members or more, in which all rewards are alike."""
    totals = [[t.reward.total for t in group.trajectories if isinstance(t.reward, RewardParts)] for group in groups]
    compared = [rewards for rewards in totals if len(rewards) > 1]
    return {"degenerate_groups": sum(len(set(r)) == 1 for r in compared) / len(compared)} if compared else {}


def _reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    scored = [t.reward for t in trajectories if isinstance(t.reward, RewardParts)]
    metrics = {"unscored": sum(isinstance(t.reward, Unscored) for t in trajectories) / len(trajectories)}
    if not scored:
        return metrics
    totals = [reward.total for reward in scored]
    metrics |= {"reward": statistics.fmean(totals), "reward_std": statistics.pstdev(totals)}
    for name in sorted({name for reward in scored for name in reward.parts}):
        values = [reward.parts[name] for reward in scored if name in reward.parts]
        metrics[f"reward/{name}"] = statistics.fmean(values)
    if f"reward/{ACCURACY_PART}" in metrics:
        metrics["accuracy"] = metrics[f"reward/{ACCURACY_PART}"]
    return metrics | _source_metrics(trajectories)


def _source_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Accuracy of every data source, where there are several."""
    sources = sorted({t.task.data_source for t in trajectories})
    metrics = {}
    for source in sources if len(sources) > 1 else ():
        rewards = [t.reward for t in trajectories if t.task.data_source == source and isinstance(t.reward, RewardParts)]
        values = [reward.parts[ACCURACY_PART] for reward in rewards if ACCURACY_PART in reward.parts]
        if values:
            metrics[f"source/{source}/{ACCURACY_PART}"] = statistics.fmean(values)
    return metrics


def _tool_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    if not trajectories:
        return {}
    calls = [call for t in trajectories for call in t.tool_calls]
    metrics = {
        "tool_rate": sum(any(call.ok for call in t.tool_calls) for t in trajectories) / len(trajectories),
        "tool/calls": len(calls) / len(trajectories),
        "tool/errors": float(sum(not call.ok for call in calls)),
        "tool/seconds": statistics.fmean([call.seconds for call in calls] or [0.0]),
    }
    overlaps = [best_iou(t) for t in trajectories if target_box(t.task) is not None]
    if overlaps:
        metrics["iou"] = statistics.fmean(overlaps)
    return metrics


def best_iou(trajectory: Trajectory) -> float:
    """Best overlap of a successful tool call's region with the target; 0 without a call."""
    target = target_box(trajectory.task)
    if target is None:
        return 0.0
    boxes = [call.box_px for call in trajectory.tool_calls if call.ok and call.box_px is not None]
    return max((iou(box, target) for box in boxes), default=0.0)
