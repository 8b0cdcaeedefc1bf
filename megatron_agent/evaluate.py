"""The agent loop over held-out files, greedy, without training: `megatron-agent evaluate run.yaml`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

from megatron_agent import cluster, stages
from megatron_agent.config import RunConfig
from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.rollout.collect import rollout_metrics
from megatron_agent.rollout.rollouts import Rollouts
from megatron_agent.types import Task, Trajectory, TrajectoryGroup


async def evaluate(rollouts: Rollouts, tasks: Sequence[Task]) -> tuple[dict[str, float], list[Trajectory]]:
    """Episodes of `tasks`, sampled as `rollout.validation` says -> metrics (accuracy, tool_rate, iou, ...) and trajectories."""
    trajectories = await rollouts.validate(tasks)
    return rollout_metrics([TrajectoryGroup(t.task, [t]) for t in trajectories]), trajectories


async def run(config: RunConfig) -> dict[str, dict[str, float]]:
    """Evaluate the checkpoint of `model.path` (or the run's last one with resume=auto) on all evaluation files."""
    from megatron_agent.training.checkpoint import complete_checkpoints

    saved = complete_checkpoints(config.folder / "checkpoints") if config.resume == "auto" else []
    if config.resume == "auto" and not saved:
        raise CheckpointError(f"resume=auto: no complete checkpoint in {config.folder / 'checkpoints'}")
    family = stages.check(config)
    store = stages.image_store(config)
    data = stages.read_data(config, family, store, with_training=False)
    if not data.heldout and not data.without_tool:
        raise ConfigError("evaluation.files is empty: nothing to evaluate on")
    cluster.start_ray()
    try:
        parts, ready = stages.start(config, family, data, store)
        await asyncio.gather(parts.rollouts.reward.start(), *ready)
        if saved:
            await parts.actor.load(saved[-1])
            async with parts.weights.lock:
                await parts.sync_weights()
        results = {}
        for name, tasks in (("heldout", data.heldout), ("without_tool", data.without_tool)):
            if tasks:
                results[name], _ = await evaluate(parts.rollouts, tasks)
        await parts.rollouts.reward.close()
        return results
    finally:
        cluster.stop_ray()


def main(arguments: list[str]) -> int:
    from megatron_agent.cli import load_config

    config = load_config(arguments)
    sys.stdout.write(json.dumps(asyncio.run(run(config)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    from megatron_agent.cli import guarded

    sys.exit(guarded(main, sys.argv[1:]))
