"""GRPO: group-relative policy optimisation (arXiv 2402.03300, equation 3; advantages: section 4.1.2).

Token-mean and no KL by default; the paper has `aggregation: sequence-mean` and `kl: {coefficient: 0.04}` (k3, equation 4).

Dr. GRPO (arXiv 2503.20783, section 3.2) is `normalise_std: false, aggregation: fixed-length, fixed_length_tokens: N`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_agent.algorithms.advantages import group_centred, spread
from megatron_agent.algorithms.options import ClipOptions
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import TrainSample


class GRPO(PolicyGradient):
    """Advantage of every action token: the reward, centred and normalised within its group of rollouts."""

    @dataclass
    class Config(ClipOptions):
        normalise_std: bool = True

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return spread(samples, group_centred(samples, self.total_rewards(samples), self.config.normalise_std))


COMPONENT = GRPO
