"""CISPO: clipped importance sampling weights (arXiv 2506.13585, equations 4 and 5): every token keeps its gradient.

The paper clips the weight from above alone and does not say where: the default of `clip_high` (weights up to 5) is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_agent.algorithms.advantages import group_centred, spread
from megatron_agent.algorithms.objectives import ratio_of
from megatron_agent.algorithms.options import ClipOptions
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.errors import ConfigError
from megatron_agent.types import LossInputs, TrainSample


class CISPO(PolicyGradient):
    """GRPO's advantage; REINFORCE, each token weighted by its clipped ratio, which carries no gradient."""

    @dataclass
    class Config(ClipOptions):
        clip_low: float = 1.0  # no lower end, as in the paper
        clip_high: float = 4.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.dual_clip:
                raise ConfigError("algorithm.dual_clip: cispo clips the weight at both ends already; give 0")
            if self.importance.correction == "clip":
                raise ConfigError(
                    "algorithm.importance.correction='clip': cispo clips a weight and keeps every gradient, so that nothing "
                    "would bound stale tokens; give truncate or mask"
                )

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return spread(samples, group_centred(samples, self.total_rewards(samples), normalise_std=True))

    def policy_loss(self, inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ratio = ratio_of((inputs.logprobs_R - inputs.old_logprobs_R).detach())
        weight = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return -weight * inputs.advantages_R * inputs.logprobs_R, ratio, weight != ratio


COMPONENT = CISPO
