"""From log-probs to a scalar loss, once for all algorithms: token-mean denominators, metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.types import LossInputs, LossOutputs, MicroBatch


@dataclass
class LossStats:
    """Sums and maxima over the tokens of one rank; add up over micro-batches and ranks."""

    num_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values_R: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values_R.sum(dtype=torch.float64))
        self.counts[name] = self.counts.get(name, 0) + values_R.numel()

    def maximum(self, name: str, values_R: torch.Tensor) -> None:
        if values_R.numel():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(values_R.max()))

    def merge(self, other: LossStats) -> None:
        self.num_tokens += other.num_tokens
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), value)

    def only(self, maximum: str) -> LossStats:
        """Nothing but one maximum, where it was measured."""
        return LossStats(maxima={n: value for n, value in self.maxima.items() if n == maximum})

    def means(self) -> dict[str, float]:
        return {**{n: s / max(self.counts[n], 1) for n, s in self.sums.items()}, **self.maxima}


class Supervised(Algorithm):
    """Cross-entropy on the action tokens: what the warm start minimises."""

    def advantages(self, samples):
        return [[float(own) for own in sample.action_mask_T] for sample in samples]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs_R)


def microbatch_loss(
    logprobs_R: torch.Tensor,
    entropy_R: torch.Tensor,
    batch: MicroBatch,
    algorithm: Algorithm,
    denominator_tokens: int,
    stats: LossStats,
    context_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The micro-batch's share of the loss: sum over its action tokens / action tokens of the whole mini-batch.

    Shares add up to the token-mean over all ranks and micro-batches, whatever the split: gradients are summed, never
    averaged (megatron.py switches Megatron's own averaging off).
    """
    current = logprobs_R.detach()
    old = current if batch.old_logprobs_R is None else batch.old_logprobs_R
    outputs = algorithm.loss(
        LossInputs(
            logprobs_R=logprobs_R,
            old_logprobs_R=old,
            rollout_logprobs_R=batch.rollout_logprobs_R,
            advantages_R=batch.advantages_R,
            sample_index_R=batch.sample_index_R,
            num_samples=len(batch.sample_ids),
            entropy_R=entropy_R,
            context_group=context_group,
        )
    )
    stats.num_tokens += current.numel()
    stats.add("loss", outputs.loss_R.detach())
    stats.add("entropy", entropy_R.detach())
    for name, values in outputs.metrics_R.items():
        stats.add(name, values)
    if "ratio" in outputs.metrics_R:
        stats.maximum("ratio_max", outputs.metrics_R["ratio"])
    add_gap(stats, current if batch.old_logprobs_R is None else old, batch)
    return outputs.loss_R.sum() / denominator_tokens


def add_gap(stats: LossStats, trainer_logprobs_R: torch.Tensor, batch: MicroBatch) -> None:
    """|log-prob(trainer) - log-prob(vLLM)| of every generated token, and apart: before and after a tool's picture."""
    gap = (trainer_logprobs_R - batch.rollout_logprobs_R).abs()
    stats.add("logprob_gap_mean", gap)
    stats.maximum("logprob_gap_max", gap)
    for name, mask in (("before_image", ~batch.after_image_R), ("after_image", batch.after_image_R)):
        if mask.any():
            stats.add(f"logprob_gap_mean/{name}", gap[mask])
