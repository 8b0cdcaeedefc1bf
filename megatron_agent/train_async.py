"""The overlapped loop: rollouts run ahead while the trainer updates, at most `training.max_staleness` weight versions.

`python -m megatron_agent.train_async run.yaml section.key=value ...` or `megatron-agent train-async run.yaml ...`

A weight sync waits for no trajectory: the engines cut the turns under way and go on with them under the new weights, token by
token known by its version. 0 gives the numbers of the synchronous loop, 1 is one step off. What the trainer's log-probs and
the engines' differ by is `algorithm.importance`'s to correct.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from megatron_agent import cluster
from megatron_agent.algorithms.options import Options
from megatron_agent.config import RunConfig
from megatron_agent.data.stream import TaskMix, TaskStream
from megatron_agent.errors import ConfigError
from megatron_agent.observe.boards import Boards
from megatron_agent.observe.metrics import Timer
from megatron_agent.probe import probe
from megatron_agent.queue_file import QueueFile
from megatron_agent.rollout.ahead import RolloutsAhead
from megatron_agent.run_state import Progress, StopSignal
from megatron_agent.stages import Stages
from megatron_agent.train import end_step, evaluate_between, is_due, learn, train
from megatron_agent.training.samples import scored_samples

log = logging.getLogger("megatron_agent")


def check_overlap(config: RunConfig) -> None:
    """Raises ConfigError for what only the synchronous loop does; warns of stale tokens that nothing corrects."""
    algorithm, bound = config.algorithm, config.training.max_staleness
    if bound and isinstance(algorithm, Options) and algorithm.importance.correction == "none":
        log.warning(
            "training.max_staleness=%d and algorithm.importance.correction=none: tokens of older weights are trained on "
            "as if the current ones had sampled them, and a run may collapse (the quickstart did); "
            "'algorithm.importance={correction: clip}' takes the clipped ratio to what they were sampled with (gpg and cispo: "
            "truncate or mask)",
            bound,
        )
    if config.rollout.oversample:
        raise ConfigError(
            f"rollout.oversample={config.rollout.oversample} is of the synchronous loop; here training.max_staleness="
            f"{config.training.max_staleness} says how far rollouts run ahead: give rollout.oversample=0"
        )


async def steps_ahead(parts: Stages, progress: Progress, boards: Boards, stop: StopSignal) -> None:
    """waits for: enough groups (RolloutsAhead.take), then the update and the sync, beside which rollouts go on; evaluations and
    checkpoints hold up neither. However it ends, the queue is kept with the last finished step."""
    config, queue = parts.config, QueueFile(parts)
    stream = parts.data.train
    if stream is None:  # no steps are asked for (stages.read_data)
        return
    ahead = make_queue(parts, stream, progress.step)
    if config.training.max_staleness and cluster.is_colocated(config):
        log.warning("trainer and engines share their GPUs: rollouts ahead take turns with the updates and gain little; give "
                    "each side its own, or run megatron_agent.train")  # fmt: skip
    if (snapshot := queue.load(progress.step)) is not None:
        ahead.restore(snapshot)
    try:
        for step in range(progress.step + 1, config.training.num_steps + 1):
            with progress.timed("seconds_train"):
                timer = Timer()
                with timer.phase("rollout"):
                    groups, refused = await stop.or_done(ahead.take(), f"step {step}: waiting for rollouts", boards)
                if parts.algorithm.needs_greedy:
                    groups = await parts.with_greedy(groups)
                counts = {"queue/finished": float(ahead.num_finished), "queue/under_way": float(ahead.num_under_way)}
                metrics = await learn(parts, progress, step, groups, refused, timer, boards, counts)
                ahead.commit()
                if config.training.max_staleness and is_due(step, config.observe.probe_every_steps):
                    gap = await stop.or_done(probe(parts, groups), f"step {step}: probing the log-prob gap", boards)
                    boards.log(step, gap, phase="probe")
                    metrics |= gap  # for the alarms
                if is_due(step, config.checkpoint.every_steps) or is_due(step, config.evaluation.every_steps):
                    queue.try_to_save(ahead.snapshot(), stream.state())
                await end_step(parts, progress, metrics, boards)
            await evaluate_between(parts, progress, boards, stop)
    finally:
        if ahead.updates == progress.step:  # else the update of a step was cut
            queue.try_to_save(ahead.snapshot(), stream.state())
        await ahead.close()


def make_queue(parts: Stages, stream: TaskStream | TaskMix, updates: int) -> RolloutsAhead:
    training = parts.config.training
    return RolloutsAhead(
        parts.rollouts,
        stream.next,
        lambda group: parts.algorithm.keep_group(scored_samples([group])),
        training.prompts_per_step,
        training.max_staleness,
        training.num_steps,
        parts.algorithm.max_sampling_rounds,
        updates=updates,
    )


def main(arguments: list[str]) -> int:
    from megatron_agent.cli import load_config

    config = load_config(arguments)
    check_overlap(config)
    asyncio.run(train(config, steps_ahead))
    return 0


if __name__ == "__main__":
    from megatron_agent.cli import guarded

    sys.exit(guarded(main, sys.argv[1:]))
