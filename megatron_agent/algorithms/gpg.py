"""GPG: group policy gradient (arXiv 2504.02546): no ratio, no clipping, no reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_agent.algorithms.advantages import group_centred, is_flat, members, spread
from megatron_agent.algorithms.objectives import ratio_of
from megatron_agent.algorithms.options import Options
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.errors import ConfigError
from megatron_agent.types import LossInputs, TrainSample


class GPG(PolicyGradient):
    """Rewards centred within their group, and scaled up for the groups of equal rewards, which give no gradient."""

    @dataclass
    class Config(Options):
        normalise_std: bool = False  # the paper's F_norm: 1, or the group's std

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.importance.correction == "clip":
                raise ConfigError("algorithm.importance.correction='clip': gpg has no ratio to clip; give truncate or mask")

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        rewards = self.total_rewards(samples)
        valid = sum(len(group) for group in members(samples) if not is_flat([rewards[i] for i in group]))
        scale = len(samples) / valid if valid else 0.0
        centred = group_centred(samples, rewards, self.config.normalise_std)
        return spread(samples, [scale * value for value in centred])

    def policy_loss(self, inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ratio = ratio_of((inputs.logprobs_R - inputs.old_logprobs_R).detach())  # a metric alone
        return -inputs.advantages_R * inputs.logprobs_R, ratio, torch.zeros_like(ratio, dtype=torch.bool)


COMPONENT = GPG
