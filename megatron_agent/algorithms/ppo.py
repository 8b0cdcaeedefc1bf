"""PPO (arXiv 1707.06347, equation 7) with a critic and generalised advantage estimates (arXiv 1506.02438, equation 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_agent.algorithms.advantages import actions, gae, to_rows, whitened
from megatron_agent.algorithms.options import ClipOptions, CriticOptions, within
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import TrainSample


class PPO(PolicyGradient):
    """Advantages from one action token to the next, over whatever observations lie between, whitened over the batch."""

    needs_critic = True

    @dataclass
    class Config(ClipOptions):
        discount: float = 1.0
        gae_lambda: float = 1.0
        whiten: bool = True
        critic: CriticOptions = field(default_factory=CriticOptions)

        def __post_init__(self) -> None:
            super().__post_init__()
            within("discount", self.discount, 0, 1)
            within("gae_lambda", self.gae_lambda, 0, 1)

    def _estimates(self, sample: TrainSample) -> tuple[np.ndarray, np.ndarray]:
        """-> (advantages, values), [A]."""
        if not sample.num_action_tokens:
            return np.zeros(0), np.zeros(0)
        if sample.values_T is None:
            raise ValueError("PPO's advantages need values_T: let the critic fill them first")
        values = actions(sample, sample.values_T)
        return gae(self.rewards(sample), values, self.config.discount, self.config.gae_lambda), values

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        found = [self._estimates(sample)[0] for sample in samples]
        return to_rows(samples, whitened(found) if self.config.whiten else found)

    def returns(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Advantage + value: the lambda-return."""
        return to_rows(samples, [advantages + values for advantages, values in map(self._estimates, samples)])


COMPONENT = PPO
