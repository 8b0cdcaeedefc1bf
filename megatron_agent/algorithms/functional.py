"""Math that several algorithms share; pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from megatron_agent.types import TrainSample


def spread(samples: Sequence[TrainSample], values: Sequence[float]) -> list[list[float]]:
    """One value per sample -> one list [T] per sample: the value on action tokens, 0 elsewhere."""
    return [[value if own else 0.0 for own in sample.action_mask_T] for sample, value in zip(samples, values)]


def group_normalised(samples: Sequence[TrainSample], normalise_std: bool, eps: float = 1e-6) -> list[float]:
    """(r - mean) / std within each group (unbiased std); 0 in groups of one or of equal rewards."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.group_id].append(index)
    values = [0.0] * len(samples)
    for members in groups.values():
        rewards = [samples[i].reward for i in members]
        mean = sum(rewards) / len(rewards)
        spread_of_group = max(rewards) - min(rewards)
        if len(members) < 2 or spread_of_group <= eps:
            continue
        std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
        for i, reward in zip(members, rewards):
            values[i] = (reward - mean) / (std if normalise_std else 1.0)
    return values


def clipped_ratio_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO's pessimistic clipped objective per token (arXiv 1707.06347, equation 7), negated; -> (loss, ratio, clipped)."""
    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(unclipped, clipped), ratio.detach(), (clipped > unclipped).detach()
