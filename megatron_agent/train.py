"""The synchronous loop: tasks -> rollouts -> samples -> update -> weights, once per step.

`python -m megatron_agent.train run.yaml section.key=value ...` or `megatron-agent train run.yaml ...`
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from megatron_agent import cluster, stages
from megatron_agent.config import RunConfig
from megatron_agent.data.images import ImageStore
from megatron_agent.errors import AlarmStop, EngineError, StopRequested, TrainingError
from megatron_agent.evaluate import evaluate
from megatron_agent.models.base import ModelFamily
from megatron_agent.observe.boards import Boards
from megatron_agent.observe.metrics import Timer
from megatron_agent.observe.transcripts import rewind_transcripts, write_transcript
from megatron_agent.queue_file import QueueFile
from megatron_agent.report import write_report
from megatron_agent.rollout.ahead import Snapshot, Start
from megatron_agent.rollout.collect import Unfinished, rollout_metrics
from megatron_agent.run_state import Progress, StopSignal, keep_old_run
from megatron_agent.sft import warm_start
from megatron_agent.stages import Data, Stages
from megatron_agent.training.samples import scored_samples, staleness
from megatron_agent.types import TrajectoryGroup

Loop: TypeAlias = Callable[[Stages, Progress, Boards, StopSignal], Awaitable[None]]


async def train(config: RunConfig, loop: Loop | None = None) -> Progress:
    """A whole run: warm start, evaluation, RL, evaluation, report. Raises our errors; a stop signal ends it in order.

    `loop`: how its steps go (None: `steps_in_turn`).
    """
    family = stages.check(config)
    resumed = Progress.last(config)
    store = stages.image_store(config)
    data = stages.read_data(config, family, store, with_warmup=resumed is None)
    if resumed is None:
        keep_old_run(config.folder)
    stages.record_config(config)
    progress = resumed or Progress()
    cluster.start_ray()
    stop = StopSignal()  # after Ray, which takes SIGTERM for itself
    try:
        with Boards(config.folder, config.observe, config.training.num_steps) as boards:
            parts = await get_ready(config, family, data, store, progress, boards, stop)
            if resumed is not None:
                boards.rewind(progress.step + 1)
                rewind_transcripts(config.folder / "transcripts.jsonl", progress.step + 1)
            if not progress.before:
                await evaluate_all(parts, progress, "before", boards, stop)
            try:
                await (loop or steps_in_turn)(parts, progress, boards, stop)
                await parts.rollouts.close()
                await progress.save(parts)
                await evaluate_all(parts, progress, "after", boards, stop)
            except (StopRequested, EngineError, AlarmStop):  # the trainer is whole
                await progress.save(parts, wait=True)
                raise
            finally:  # episodes that were carried over, while there is still a Ray to cancel them in
                await parts.rollouts.close()
                await parts.rollouts.reward.close()
            await parts.checkpoints.finish(parts.learner)
            write_report(config, progress, store)
            boards.note(f"done: {config.folder}/summary.json, curves.png, trajectories.html")
        return progress
    finally:
        cluster.stop_ray()


async def get_ready(
    config: RunConfig, family: ModelFamily, data: Data, store: ImageStore, progress: Progress, boards: Boards, stop: StopSignal
) -> Stages:
    """Trainer and engines up, warm start done or checkpoint loaded, the engines on the trainer's weights."""
    with progress.timed("seconds_setup"):
        parts, (trainer_ready, engines_ready) = stages.start(config, family, data, store)
        await stop.or_done(parts.rollouts.reward.start(), "checking the judge", boards)
        await stop.or_done(trainer_ready, "starting the trainer", boards, beside=engines_ready)
    if data.warmup:
        with progress.timed("seconds_train"):
            await stop.or_done(warm_start(parts, boards), "warm start", boards, beside=engines_ready)
    await parts.actor.reset_optimizer(config.training.lr, config.training.clip_grad)
    if data.warmup and parts.learner.needs_start:
        await parts.checkpoints.save_start(parts.actor)
    await parts.learner.begin(parts.checkpoints.start)
    if data.warmup:
        await progress.save(parts, wait=True)  # the engines are still starting
    else:
        await progress.restore(parts)
    with progress.timed("seconds_setup"):
        await stop.or_done(engines_ready, "starting the rollout engines", boards)
        async with parts.weights.lock:
            await parts.sync_weights()
    return parts


def is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


async def steps_in_turn(parts: Stages, progress: Progress, boards: Boards, stop: StopSignal) -> None:
    """Rollouts, then the update, then the weights, until `training.num_steps` are done.

    What `rollout.carry_over` left under way is kept beside every checkpoint, as it was at the end of the step.
    """
    queue = QueueFile(parts)
    carried: Snapshot | None = None
    starts: dict[int, Start] = {}  # of what is carried over, by number
    if parts.config.rollout.carry_over and (carried := queue.load(progress.step)) is not None:
        assert parts.data.train is not None
        progress.stream = dict(parts.data.train.state())  # as it was when what is carried over had been drawn
        for start, group in carried.unfinished:
            starts[parts.rollouts.go_on(group, start.step)] = start
        for start, whole in carried.finished:  # of a run of the overlapped loop
            starts[parts.rollouts.go_on(Unfinished(whole.task, whole.trajectories), start.step)] = start
    try:
        for step in range(progress.step + 1, parts.config.training.num_steps + 1):
            with progress.timed("seconds_train"):
                timer = Timer()
                with timer.phase("rollout"):
                    groups, refused = await stop.or_done(parts.sample_groups(step), f"step {step}: rollouts", boards)
                metrics = await learn(parts, progress, step, groups, refused, timer, boards)
                if parts.config.rollout.carry_over:
                    unfinished = parts.rollouts.unfinished()
                    starts = {number: starts.get(number, Start(step - 1, step)) for number in unfinished}
                    carried = Snapshot(step, 0, [], [(starts[number], group) for number, group in unfinished.items()])
                    if is_due(step, parts.config.checkpoint.every_steps) or is_due(step, parts.config.evaluation.every_steps):
                        queue.try_to_save(carried, progress.stream)
                await end_step(parts, progress, metrics, boards)
            await evaluate_between(parts, progress, boards, stop)
    finally:
        if carried is not None and carried.updates == progress.step:
            queue.try_to_save(carried, progress.stream)


async def end_step(parts: Stages, progress: Progress, metrics: dict[str, float], boards: Boards) -> None:
    """Alarms are said, a save under way is looked at, and the next one started where it is due. Raises AlarmStop after an alarm
    that is configured to stop the run, TrainingError for numbers that are not finite."""
    alarms = parts.alarms.check(progress.step, metrics)
    progress.alarms = parts.alarms.state()
    for alarm in alarms:
        boards.note(f"ALARM step {progress.step}: {alarm.name}: {alarm.text}")
    for alarm in alarms:
        if alarm.action == "stop":
            how = f"step {progress.step}: {alarm.name}: {alarm.text} (observe.alarms.actions.{alarm.name}=stop)"
            raise TrainingError(how) if alarm.name == "not_finite" else AlarmStop(how)
    await parts.checkpoints.check(parts.learner)
    if is_due(progress.step, parts.config.checkpoint.every_steps):
        await progress.save(parts)


async def evaluate_between(parts: Stages, progress: Progress, boards: Boards, stop: StopSignal) -> None:
    if is_due(progress.step, parts.config.evaluation.every_steps) and progress.step < parts.config.training.num_steps:
        await evaluate_all(parts, progress, "between", boards, stop)


async def learn(
    parts: Stages,
    progress: Progress,
    step: int,
    groups: list[TrajectoryGroup],
    refused: list[TrajectoryGroup],
    timer: Timer,
    boards: Boards,
    counts: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Groups -> update -> the engines' weights -> the step's record, its metrics. Rollouts may be cut short by a stop signal;
    this is not, so that weights and progress agree. `timer` holds what the step took so far, `counts` metrics of the loop."""
    config = parts.config
    samples = scored_samples(groups, parts.weight_version)
    async with parts.weights.lock:
        with timer.phase("train"):
            boards.status(f"step {step}: update on {len(samples)} rows")
            progress.is_updating = True
            metrics = await parts.learner.update(
                samples, step, config.training.minibatches_per_step, config.rollout.temperature
            )
        with timer.phase("sync"):
            if metrics:
                await parts.sync_weights()
            else:
                boards.note(f"step {step}: no trajectory to learn from; nothing was learned")
    timer.seconds["step"] = sum(timer.seconds.values())
    metrics |= {**staleness(samples), **counts}
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    metrics |= {"groups_refused": float(len(refused))} if refused else {}
    metrics |= rollout_metrics([*groups, *refused]) | timer.metrics() | {"weight_version": float(parts.weight_version)}
    generated = sum(trajectory.num_response_tokens for trajectory in trajectories)
    metrics["tokens_per_s"] = (generated + metrics.get("train_tokens", 0.0)) / timer.seconds["step"]
    progress.finish_step(step, parts, len(trajectories))
    boards.log(step, metrics)
    write_transcript(config.folder / "transcripts.jsonl", step, trajectories, config.observe.transcripts_per_step)
    return metrics


async def evaluate_all(parts: Stages, progress: Progress, when: str, boards: Boards, stop: StopSignal) -> None:
    """Held-out episodes with the tool and, before and after, the same questions without it."""
    data = parts.data
    kinds = [("heldout", "eval", data.heldout), ("without_tool", "eval_without_tool", data.without_tool)]
    with progress.timed("seconds_evaluation"):
        found: dict[str, float] = {}
        for name, phase, tasks in kinds[:1] if when == "between" else kinds:
            if tasks:
                work = evaluate(parts.rollouts, tasks)
                metrics, trajectories = await stop.or_done(work, f"evaluation on {name}", boards)
                progress.keep_evaluation(when, name, metrics, trajectories)
                boards.log(progress.step, metrics, phase=phase)
                found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        await progress.keep_best(parts, found)


def main(arguments: list[str]) -> int:
    from megatron_agent.cli import load_config

    asyncio.run(train(load_config(arguments)))
    return 0


if __name__ == "__main__":
    from megatron_agent.cli import guarded

    sys.exit(guarded(main, sys.argv[1:]))
