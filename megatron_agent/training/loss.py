"""From logits to a scalar loss, once for all algorithms: vocab-parallel log-probs, token-mean denominators, metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.types import LossInputs, LossOutputs, MicroBatch


class _VocabParallelLogProb(torch.autograd.Function):
    """Log-prob of the target and entropy of softmax over logits [R, V / tp] split over `group`."""

    @staticmethod
    def forward(ctx, logits, targets, first, group):
        peak = logits.max(-1).values
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        exponent = (logits - peak[:, None]).exp_()
        local = targets - first
        inside = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, logits.shape[1] - 1)
        chosen = logits.gather(1, local[:, None])[:, 0] * inside
        sums = torch.stack([exponent.sum(-1), (exponent * logits).sum(-1), chosen])
        dist.all_reduce(sums, group=group)
        total, weighted, chosen = sums
        probability = exponent.div_(total[:, None])
        normaliser = peak + total.log()
        mean_logit = weighted / total
        ctx.save_for_backward(probability, local, inside, logits, mean_logit)
        return chosen - normaliser, normaliser - mean_logit

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        probability, local, inside, logits, mean_logit = ctx.saved_tensors
        # d entropy / d logit_j = p_j (mean logit - logit_j)
        grad = probability * ((mean_logit[:, None] - logits) * grad_entropy[:, None] - grad_logprob[:, None])
        grad.scatter_add_(1, local[:, None], (grad_logprob * inside)[:, None])
        return grad, None, None, None


def vocab_parallel_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, temperature: float, rank: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [R, V_padded / tp], targets int64 [R] -> (log-probs [R], entropy [R]) in fp32, both differentiable.

    The padding of the vocabulary takes no probability; `temperature` is the sampling temperature, so that log-probs
    are of the distribution that was sampled from.
    """
    width = logits.shape[1]
    logits = logits.float() / temperature
    if (rank + 1) * width > vocab_size:
        column = torch.arange(rank * width, (rank + 1) * width, device=logits.device)
        logits = logits.masked_fill(column >= vocab_size, -1e30)  # finite: 0 * -inf would be NaN in the entropy
    return _VocabParallelLogProb.apply(logits, targets, rank * width, group)


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
