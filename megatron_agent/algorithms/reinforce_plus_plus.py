"""REINFORCE++ (arXiv 2501.03262v9, section 3.1): returns of tokens, normalised over the whole batch, no critic.

The paper takes the KL off the reward: `kl: {where: reward, estimator: k1}` with a coefficient above 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_agent.algorithms.advantages import returns_to_go, to_rows, whitened
from megatron_agent.algorithms.options import ClipOptions, within
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import TrainSample


class ReinforcePlusPlus(PolicyGradient):
    """Advantage of an action token: the discounted reward from it on, whitened over all action tokens of the batch."""

    @dataclass
    class Config(ClipOptions):
        discount: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            within("discount", self.discount, 0, 1)

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        returns = [returns_to_go(self.rewards(sample), self.config.discount) for sample in samples]
        return to_rows(samples, whitened(returns))


COMPONENT = ReinforcePlusPlus
