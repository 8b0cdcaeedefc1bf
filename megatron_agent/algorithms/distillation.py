"""On-policy distillation: reverse KL to a teacher on the student's own trajectories (arXiv 2306.13649, section 3;
arXiv 2306.08543, equation 1): every token is told how much likelier the teacher finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_agent.algorithms.advantages import group_centred, spread
from megatron_agent.algorithms.options import ClipOptions, KLOptions, within
from megatron_agent.algorithms.policy_gradient import PolicyGradient
from megatron_agent.errors import ConfigError
from megatron_agent.types import LossInputs, LossOutputs, TrainSample


class Distillation(PolicyGradient):
    """Advantage of an action token: log teacher - log student (before the update), the single-token estimate of -KL;
    and, with a `reward_coefficient`, GRPO's advantage on top."""

    @dataclass
    class Config(ClipOptions):
        teacher_path: str = ""  # Hugging Face folder, same family and tokenizer; empty: the policy that RL began with
        teacher_coefficient: float = 1.0
        reward_coefficient: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            within("teacher_coefficient", self.teacher_coefficient, 0)
            within("reward_coefficient", self.reward_coefficient, 0)
            if self.kl != KLOptions():
                raise ConfigError("algorithm.kl: the teacher is the reference here; give teacher_coefficient")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def teacher_path(self) -> str:
        return self.config.teacher_path

    def advantages(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        centred = group_centred(samples, self.total_rewards(samples), normalise_std=True)
        return spread(samples, [self.config.reward_coefficient * value for value in centred])

    def loss(self, inputs: LossInputs) -> LossOutputs:
        if inputs.reference_logprobs_R is None:
            raise ValueError("distillation needs the teacher's log-probs in reference_logprobs_T")
        preference = (inputs.reference_logprobs_R - inputs.old_logprobs_R).detach()
        advantages = inputs.advantages_R + self.config.teacher_coefficient * preference
        return super().loss(replace(inputs, advantages_R=advantages))


COMPONENT = Distillation
