"""Tasks -> groups of scored trajectories. Every trajectory is a task of its own: nobody waits for a turn of another."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
from collections.abc import Awaitable, Callable, Sequence

from megatron_agent.rewards.base import RewardBase, iou, target_box
from megatron_agent.types import RewardParts, Status, Task, Trajectory, TrajectoryGroup, Unscored

ACCURACY_PART = "accuracy"


def trajectory_seed(run_seed: int, step: int, task_id: str, sample_index: int) -> int:
    """A sampling seed in [0, 2**31) that depends on nothing but its arguments, on any machine."""
    name = f"{run_seed}|{step}|{task_id}|{sample_index}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "little") & 0x7FFFFFFF


async def collect(
    tasks: Sequence[Task],
    num_samples: int,
    run_one: Callable[[Task, int], Awaitable[Trajectory]],
    reward: RewardBase,
    max_in_flight: int,
    on_scored: Callable[[Trajectory], None] | None = None,
) -> list[TrajectoryGroup]:
    """`num_samples` scored trajectories of every task, groups in the order of `tasks`.

    consumes: `run_one(task, sample_index)`, one episode. waits for: episodes, `max_in_flight` at a time, started in order,
    and each one's score; scoring does not hold a place, so a slow judge starves no engine.
    unblocked by: the end of any episode. produces: groups; `on_scored` sees each trajectory at once.
    The first exception cancels all other episodes and is raised.
    """
    places = asyncio.Semaphore(max_in_flight)

    async def one(task: Task, sample_index: int) -> Trajectory:
        async with places:
            trajectory = await run_one(task, sample_index)
        trajectory.reward = await reward.score(trajectory, task)
        if on_scored is not None:
            on_scored(trajectory)
        return trajectory

    running = [asyncio.create_task(one(task, index)) for task in tasks for index in range(num_samples)]
    try:
        done = await asyncio.gather(*running)
    except BaseException:  # cancelled or failed alike: no episode may outlive its collection
        for episode in running:
            episode.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise
    return [
        TrajectoryGroup(task, list(done[start : start + num_samples]))
        for task, start in zip(tasks, range(0, len(done), num_samples), strict=True)
    ]


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
    return metrics | _tool_metrics([t for t in trajectories if t.task.env_name])


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
