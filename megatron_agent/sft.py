"""Supervised warm start: scripted trajectories through the same agent loop, tools, masks and actor as RL.

No box, no crop and no tool answer is a target of its own: only the tokens that the script says the model wrote.
"""

from __future__ import annotations

import logging
import random

from megatron_agent.config import SftSection
from megatron_agent.errors import DataError
from megatron_agent.observe.boards import Boards
from megatron_agent.stages import Stages
from megatron_agent.training.loss import Supervised
from megatron_agent.training.samples import to_sample
from megatron_agent.types import Task, TrainSample

log = logging.getLogger("megatron_agent")


def lr_at(config: SftSection, step: int) -> float:
    """Rate of step `step`, from 1: linear warm-up, constant, linear decay over the last `decay_fraction`."""
    left = 1 - (step - 1) / config.num_steps
    scale = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay_fraction:
        scale = min(scale, max(config.min_lr_fraction, left / config.decay_fraction))
    return config.lr * scale


def row_order(num_rows: int, num_steps: int, rows_per_step: int, seed: int) -> list[list[int]]:
    """Rows of every step: pass after pass over all rows, each in an order drawn from the seed."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < num_steps * rows_per_step:
        order += rng.sample(range(num_rows), num_rows)
    return [order[i * rows_per_step : (i + 1) * rows_per_step] for i in range(num_steps)]


def playable(tasks: list[Task], activate_agent: bool) -> list[Task]:
    """The rows that the agent loop can play: without it (`agent.activate_agent` false) those that need a tool are skipped.

    Raises DataError when none is left.
    """
    kept = [task for task in tasks if activate_agent or not task.env_name]
    if len(kept) < len(tasks):
        log.warning("warm start: skipped %d of %d rows, which need a tool: agent.activate_agent is false",
                    len(tasks) - len(kept), len(tasks))  # fmt: skip
    if not kept:
        raise DataError("sft.files: every row needs a tool, and agent.activate_agent is false")
    return kept


async def warm_start(stages: Stages, boards: Boards) -> None:
    """`sft.num_steps` updates on the script column. Metrics go to phase "sft".

    Rows are played when they are first needed. Raises DataError for one whose script does not go through.
    """
    config, tasks = stages.config.sft, playable(stages.data.warmup, stages.config.agent.activate_agent)
    supervised = Supervised()
    await stages.actor.reset_optimizer(config.lr, config.clip_grad)
    made: dict[int, TrainSample] = {}
    order = row_order(len(tasks), config.num_steps, config.rows_per_step, stages.config.seed)
    for step, rows in enumerate(order, start=1):
        new = [row for row in rows if row not in made]
        for row, trajectory in zip(new, await stages.rollouts.scripted([tasks[row] for row in new]), strict=True):
            made[row] = to_sample(trajectory)
        samples = [made[row] for row in rows]
        metrics = await stages.actor.update(samples, supervised, lr_at(config, step))
        if step % 10 == 0 or step == config.num_steps:
            boards.log(step, {name: metrics[name] for name in ("loss", "grad_norm", "lr")}, phase="sft")
        boards.status(f"warm start {step}/{config.num_steps}, loss {metrics['loss']:.3f}")
