"""From log-probs to a scalar loss, once for all algorithms: aggregation, denominators, metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.algorithms.options import AGGREGATIONS
from megatron_agent.types import BatchSize, LossInputs, LossOutputs, MicroBatch


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


class PolicyOutput(NamedTuple):
    """What the last stage says of the targets: fp32 [R], differentiable."""

    logprobs_R: torch.Tensor
    entropy_R: torch.Tensor
    full_kl_R: torch.Tensor | None = None


class Supervised(Algorithm):
    """Cross-entropy on the action tokens: what the warm start minimises."""

    on_samples = False

    def advantages(self, samples):
        return [[float(own) for own in sample.action_mask_T] for sample in samples]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs_R)


class SumOverRanks(torch.autograd.Function):
    """All-reduce of what every rank of `group` holds a part of; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        summed = values.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return SumOverRanks.apply(grad, ctx.group), None


def microbatch_loss(
    output: PolicyOutput,
    batch: MicroBatch,
    algorithm: Algorithm,
    size: BatchSize,
    stats: LossStats,
    context_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The micro-batch's share of the loss: its tokens' losses, weighted as the algorithm's aggregation says.

    Shares add up to the aggregate over all ranks and micro-batches, whatever the split: gradients are summed, never
    averaged (megatron.py switches Megatron's own averaging off).
    """
    current = output.logprobs_R.detach()
    old = current if batch.old_logprobs_R is None else batch.old_logprobs_R
    split = context_group is not None and context_group.size() > 1
    inputs = LossInputs(
        logprobs_R=output.logprobs_R,
        old_logprobs_R=old,
        rollout_logprobs_R=batch.rollout_logprobs_R,
        advantages_R=batch.advantages_R,
        sample_index_R=batch.sample_index_R,
        num_samples=len(batch.sample_ids),
        entropy_R=output.entropy_R,
        reference_logprobs_R=batch.reference_logprobs_R,
        full_kl_R=output.full_kl_R,
        lag_R=batch.lag_R,
        sum_over_context=(lambda sums: SumOverRanks.apply(sums, context_group)) if split else None,
    )
    outputs = algorithm.loss(inputs)
    loss_R = outputs.loss_R * aggregation_weights(algorithm, inputs, size)
    stats.num_tokens += current.numel()
    stats.add("loss", loss_R.detach())
    stats.add("entropy", output.entropy_R.detach())
    for name, values in outputs.metrics_R.items():
        stats.add(name, values)
    if "ratio" in outputs.metrics_R:
        stats.maximum("ratio_max", outputs.metrics_R["ratio"])
        stats.maximum("ratio_deviation_max", (outputs.metrics_R["ratio"] - 1).abs())
    add_gap(stats, current if batch.old_logprobs_R is None else old, batch)
    return loss_R.sum() / size.num_tokens


def aggregation_weights(algorithm: Algorithm, inputs: LossInputs, size: BatchSize) -> torch.Tensor | float:
    """What a token counts beside its share in the token-mean, so that sum(weight * loss) / size.num_tokens aggregates as
    `algorithm.aggregation` says (options.py, Options)."""
    kind, of_sequences = algorithm.aggregation, size.num_tokens / max(1, size.num_sequences)
    if kind == "token-mean":
        return 1.0
    if kind == "sequence-mean":
        return of_sequences / inputs.sequence_lengths()[inputs.sample_index_R]
    if kind == "sequence-sum":
        return of_sequences
    if kind == "fixed-length":
        return of_sequences / algorithm.fixed_length_tokens
    raise ValueError(f"{type(algorithm).__name__}.aggregation={kind!r}; allowed: {', '.join(AGGREGATIONS)}")


def add_gap(stats: LossStats, trainer_logprobs_R: torch.Tensor, batch: MicroBatch) -> None:
    """|log-prob(trainer) - log-prob(vLLM)| of every token that these weights generated, and apart: before and after a tool's
    picture. Of tokens of older weights it is learning more than error: `logprob_drift_mean`."""
    gap = (trainer_logprobs_R - batch.rollout_logprobs_R).abs()
    fresh = torch.ones_like(batch.after_image_R) if batch.lag_R is None else batch.lag_R == 0
    for name, mask in (("logprob_gap_mean", fresh), ("logprob_drift_mean", ~fresh)):
        if mask.any():
            stats.add(name, gap[mask])
    stats.maximum("logprob_gap_max", gap[fresh])
    for name, mask in (("before_image", fresh & ~batch.after_image_R), ("after_image", fresh & batch.after_image_R)):
        if mask.any():
            stats.add(f"logprob_gap_mean/{name}", gap[mask])
