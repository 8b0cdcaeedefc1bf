"""Do engines and trainer still run the same model? Asked where a step's own tokens cannot tell: those of older weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_agent.errors import RequestLostError
from megatron_agent.rollout.generation import Sampling
from megatron_agent.training.samples import to_sample
from megatron_agent.types import LossUse, Trajectory, TrajectoryGroup, Turn

if TYPE_CHECKING:
    from megatron_agent.stages import Stages

NUM_ROWS, NUM_TOKENS = 8, 48


async def probe(parts: Stages, groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """The last turn of a few trajectories, sampled again by the engines -> `logprob_gap_mean`, `logprob_gap_max` and the rest
    of what a step on fresh tokens reports (training/loss.py, add_gap); empty when there is nothing to ask about.

    To be called between a sync and the next update, by who does both. waits for: NUM_ROWS short requests among those of the
    episodes under way, and one forward pass. Takes `weights.lock` for the latter only: an engine that comes back needs it to
    get its weights, and the requests may wait for that engine.
    """
    config = parts.config.rollout
    found = [trajectory for group in groups for trajectory in group.trajectories[:1] if trajectory.turns][:NUM_ROWS]
    begun = [replace(trajectory, turns=trajectory.turns[:-1], loss_use=LossUse.KEEP) for trajectory in found]

    async def go_on(index: int, trajectory: Trajectory) -> Trajectory | None:
        row = trajectory.token_ids
        room = min(NUM_TOKENS, config.max_model_len - len(row))
        support = parts.actor.support
        sampling = Sampling(config.temperature, support.top_p, support.top_k, room, banned_token_ids=support.banned_token_ids)
        name = f"probe {parts.weight_version}/{index}"
        try:
            made = await parts.rollouts.pool.generate(name, row, trajectory.images, sampling)
        except RequestLostError:  # as in an episode: the run goes on without it
            return None
        forbidden = parts.rollouts.renderer.forbidden_ids  # a row with a picture's placeholder and no picture has no positions
        made = made.first(next((i for i, token in enumerate(made.token_ids) if token in forbidden), len(made.token_ids)))
        turn = Turn(made.token_ids, made.logprobs, made.weight_versions, "", made.stop_reason)
        return replace(trajectory, turns=[*trajectory.turns, turn])

    again = await asyncio.gather(*(go_on(index, trajectory) for index, trajectory in enumerate(begun)))
    samples = [to_sample(trajectory, parts.weight_version) for trajectory in again if trajectory is not None]
    samples = [sample for sample in samples if sample.num_action_tokens]
    if not samples:
        return {}
    async with parts.weights.lock:
        gap = (await parts.actor.fill_old_logprobs(samples, config.temperature)).means()
    return {name: value for name, value in gap.items() if name.startswith("logprob_gap_")}
