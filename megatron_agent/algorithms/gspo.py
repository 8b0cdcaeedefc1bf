"""GSPO: group sequence policy optimisation (arXiv 2507.18071, equations 5 and 7, in the per-token form of 13 and 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_agent.algorithms.advantages import group_centred, spread
from megatron_agent.algorithms.objectives import clipped_ratio_loss, ratio_of
from megatron_agent.algorithms.options import ClipOptions
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import LossInputs, TrainSample


class GSPO(PolicyGradient):
    """GRPO's advantage; ratio and clipping are of whole sequences: the geometric mean of their tokens' ratios."""

    @dataclass
    class Config(ClipOptions):
        clip_low: float = 3e-4
        clip_high: float = 4e-4
        aggregation: str = "sequence-mean"

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return spread(samples, group_centred(samples, self.total_rewards(samples), normalise_std=True))

    def policy_loss(self, inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The value is the sequence's ratio, the gradient goes through the token's own log-prob: summed over the sequence
        it is that of the sequence ratio, and no gradient has to cross context ranks."""
        own = inputs.logprobs_R
        sequence = inputs.mean_over_sequence((own - inputs.old_logprobs_R).detach())[inputs.sample_index_R]
        ratio = ratio_of(sequence + own - own.detach())
        c = self.config
        loss, clipped = clipped_ratio_loss(ratio, inputs.advantages_R, c.clip_low, c.clip_high, c.dual_clip)
        return loss, ratio, clipped


COMPONENT = GSPO
