"""GRPO: group-relative policy optimisation (arXiv 2402.03300, equations 3 and 21), token-level, no KL by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.algorithms.functional import clipped_ratio_loss, group_normalised, spread
from megatron_agent.errors import ConfigError
from megatron_agent.types import LossInputs, LossOutputs, TrainSample


class GRPO(Algorithm):
    """Advantage of every action token: the outcome reward, normalised within its group of rollouts."""

    @dataclass
    class Config:
        clip_low: float = 0.2
        clip_high: float = 0.2
        normalise_std: bool = True  # False: Dr. GRPO's advantage (arXiv 2503.20783)
        entropy_coefficient: float = 0.0

        def __post_init__(self) -> None:
            for name in ("clip_low", "clip_high"):
                if not 0 < getattr(self, name) < 1:
                    raise ConfigError(f"algorithm.{name}={getattr(self, name)}: must lie between 0 and 1")

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return spread(samples, group_normalised(samples, self.config.normalise_std))

    def loss(self, inputs: LossInputs) -> LossOutputs:
        loss, ratio, clipped = clipped_ratio_loss(
            inputs.logprobs_R, inputs.old_logprobs_R, inputs.advantages_R, self.config.clip_low, self.config.clip_high
        )
        if self.config.entropy_coefficient and inputs.entropy_R is not None:
            loss = loss - self.config.entropy_coefficient * inputs.entropy_R
        return LossOutputs(loss, {"ratio": ratio, "clip_fraction": clipped.float()})


COMPONENT = GRPO
