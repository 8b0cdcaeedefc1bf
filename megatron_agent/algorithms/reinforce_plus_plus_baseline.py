"""REINFORCE++-baseline (arXiv 2501.03262v9, section 3.2): the group's mean off, then normalised over the whole batch.

The paper takes KL into the loss: `kl: {where: loss, estimator: k2}` with a coefficient above 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_agent.algorithms.advantages import actions, group_centred, spread, to_rows, whitened
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.types import TrainSample


class ReinforcePlusPlusBaseline(PolicyGradient):
    """Advantage of an action token: its trajectory's centred reward, whitened over all action tokens of the batch."""

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        centred = spread(samples, group_centred(samples, self.total_rewards(samples)))
        return to_rows(samples, whitened([actions(sample, row) for sample, row in zip(samples, centred)]))


COMPONENT = ReinforcePlusPlusBaseline
