"""RLOO: REINFORCE leave-one-out (arXiv 2402.14740), with PPO's clipped ratio for more than one mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_agent.algorithms.advantages import leave_one_out, spread
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import TrainSample


class RLOO(PolicyGradient):
    """Advantage of every action token: the reward less the mean reward of the others of its group; 0 without others."""

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return spread(samples, leave_one_out(samples, self.total_rewards(samples)))


COMPONENT = RLOO
