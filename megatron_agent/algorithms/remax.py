"""ReMax (arXiv 2310.10505): REINFORCE with the greedy trajectory's reward as the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_agent.algorithms.advantages import spread
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import TrainSample


class ReMax(PolicyGradient):
    """Advantage of every action token: the reward less that at temperature 0; 0 where that one could not be scored."""

    needs_greedy = True

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        baselines = [sample.baseline_reward for sample in samples]
        rewards = self.total_rewards(samples)
        return spread(samples, [0.0 if b is None else r - b for r, b in zip(rewards, baselines)])


COMPONENT = ReMax
