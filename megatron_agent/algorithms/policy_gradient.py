"""What all policy gradients share: rewards less KL, the clipped ratio, importance weights, KL and entropy in the loss.

An algorithm's file gives its `advantages` and, where it differs from PPO's, its `policy_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_agent.algorithms.advantages import actions, token_rewards
from megatron_agent.algorithms.base import Algorithm
from megatron_agent.algorithms.divergence import kl_estimate, next_coefficient
from megatron_agent.algorithms.objectives import clipped_ratio_loss, importance_weights, ratio_of, sampling_policy
from megatron_agent.algorithms.options import ClipOptions
from megatron_agent.types import LossInputs, LossOutputs, TrainSample


class PolicyGradient(Algorithm):
    """Its Config inherits Options, or ClipOptions with the `policy_loss` of this class."""

    Config = ClipOptions

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.aggregation, self.fixed_length_tokens = self.config.aggregation, self.config.fixed_length_tokens
        self.kl_coefficient: float = self.config.kl.coefficient

    @property
    def needs_reference(self) -> bool:
        return self.config.kl.coefficient > 0

    @property
    def needs_full_kl(self) -> bool:
        return self.needs_reference and self.config.kl.estimator == "full"

    @property
    def needs_old_logprobs(self) -> bool:
        return self.needs_reference and self.config.kl.where == "reward"

    def state(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient} if self.config.kl.target else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.config.kl.target:
            self.kl_coefficient = state.get("kl_coefficient", self.kl_coefficient)

    def end_step(self, metrics: Mapping[str, float], num_trajectories: int) -> None:
        if "kl" in metrics:
            self.kl_coefficient = next_coefficient(self.config.kl, self.kl_coefficient, metrics["kl"], num_trajectories)

    def rewards(self, sample: TrainSample) -> np.ndarray:
        """[A]: the reward of every action token, less its KL where that is in the reward."""
        rewards = token_rewards(sample)
        if not self.needs_old_logprobs or not len(rewards):
            return rewards
        if sample.old_logprobs_T is None or sample.reference_logprobs_T is None:
            raise ValueError("kl.where='reward': fill old_logprobs_T and reference_logprobs_T before advantages")
        log_ratio = actions(sample, sample.old_logprobs_T) - actions(sample, sample.reference_logprobs_T)
        return rewards - self.kl_coefficient * kl_estimate(log_ratio, self.config.kl.estimator)

    def total_rewards(self, samples: Sequence[TrainSample]) -> list[float]:
        """Of whole trajectories; one without tokens has its outcome alone."""
        if not self.needs_old_logprobs:
            return [sample.reward for sample in samples]
        return [float(self.rewards(s).sum()) if s.num_action_tokens else s.reward for s in samples]

    def policy_loss(self, inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> (loss, ratio, whether it was clipped), each [R]."""
        ratio = ratio_of(inputs.logprobs_R - inputs.old_logprobs_R)
        c = self.config
        loss, clipped = clipped_ratio_loss(ratio, inputs.advantages_R, c.clip_low, c.clip_high, c.dual_clip)
        return loss, ratio, clipped

    def loss(self, inputs: LossInputs) -> LossOutputs:
        options = self.config
        clips = options.importance.correction == "clip"
        loss, ratio, clipped = self.policy_loss(sampling_policy(inputs, options.importance) if clips else inputs)
        metrics = {"ratio": ratio.detach(), "clip_fraction": clipped.float()}
        if options.importance.correction != "none" or options.importance.max_lag >= 0:
            weights, cut = importance_weights(inputs, options.importance)
            loss = loss * weights
            metrics |= {"importance_weight": weights, "importance_cut_fraction": cut.float()}
        if self.needs_reference:
            kl = self._kl(inputs)
            metrics["kl"] = kl.detach()
            if options.kl.where == "loss":
                loss = loss + self.kl_coefficient * kl
        if options.entropy_coefficient and inputs.entropy_R is not None:
            loss = loss - options.entropy_coefficient * inputs.entropy_R
        return LossOutputs(loss, metrics)

    def _kl(self, inputs: LossInputs) -> torch.Tensor:
        if self.needs_full_kl:
            if inputs.full_kl_R is None:
                raise ValueError("kl.estimator='full' needs full_kl_R of the trainer")
            return inputs.full_kl_R
        if inputs.reference_logprobs_R is None:
            raise ValueError("kl.coefficient above 0: fill reference_logprobs_T before the update")
        return kl_estimate(inputs.logprobs_R - inputs.reference_logprobs_R, self.config.kl.estimator)
