"""Losses of single tokens and their weights; pure functions of [R] tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_agent.algorithms.divergence import LIMIT_LOG_RATIO
from megatron_agent.algorithms.options import ImportanceOptions
from megatron_agent.types import LossInputs


def ratio_of(log_ratio_R: torch.Tensor) -> torch.Tensor:
    return log_ratio_R.clamp(-LIMIT_LOG_RATIO, LIMIT_LOG_RATIO).exp()


def clipped_ratio_loss(
    ratio_R: torch.Tensor, advantages_R: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic clipped objective (arXiv 1707.06347, equation 7), negated -> (loss, whether it was clipped).

    `dual_clip` bounds what a bad token costs (arXiv 1912.09729, equation 5)."""
    free = -advantages_R * ratio_R
    bounded = -advantages_R * ratio_R.clamp(1 - clip_low, 1 + clip_high)
    loss, clipped = torch.maximum(free, bounded), bounded > free
    if dual_clip:
        ceiling = -advantages_R * dual_clip
        cut = (advantages_R < 0) & (loss > ceiling)
        loss, clipped = torch.where(cut, ceiling, loss), clipped | cut
    return loss, clipped.detach()


def sampling_policy(inputs: LossInputs, options: ImportanceOptions) -> LossInputs:
    """The same with what `correction: clip` takes the ratio to in `old_logprobs_R`: what the engine sampled with."""
    old = inputs.rollout_logprobs_R
    if options.stale_only and inputs.lag_R is not None:
        old = torch.where(inputs.lag_R > 0, old, inputs.old_logprobs_R)
    return replace(inputs, old_logprobs_R=old)


def importance_weights(inputs: LossInputs, options: ImportanceOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (weight of every token's loss, whether the correction changed or dropped it); see ImportanceOptions."""
    lag = inputs.lag_R
    log_weights = (inputs.old_logprobs_R - inputs.rollout_logprobs_R).detach()
    if options.stale_only and lag is not None:
        log_weights = torch.where(lag > 0, log_weights, 0.0)
    if options.level != "token":
        over = inputs.sum_over_sequence if options.level == "sequence" else inputs.mean_over_sequence
        log_weights = over(log_weights)[inputs.sample_index_R]
    weights = ratio_of(log_weights)
    cut = torch.zeros_like(weights, dtype=torch.bool)
    if options.correction in ("none", "clip"):
        weights = torch.ones_like(weights)
    elif options.correction == "truncate":
        cut = weights > options.high
        weights = weights.clamp(max=options.high)
    else:
        cut = (weights < options.low) | (weights > options.high)
        weights = torch.where(cut, 0.0, weights)
    if options.max_lag >= 0 and lag is not None:
        too_old = lag > options.max_lag
        weights, cut = torch.where(too_old, 0.0, weights), cut | too_old
    return weights, cut
