"""What stands on top of the decoder: log-probs and entropy of targets over a split vocabulary, or a critic's value.

Rows of logits live for one chunk at a time, forward and backward: [targets, vocabulary] is never held (the chunked
cross-entropy of Liger Kernel, arXiv 2410.10989, section 3.2, computed over tensor-parallel ranks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_agent.types import ALL_TOKENS, BANNED_LOGIT_BIAS, ReferenceHead, Support

CHUNK_BYTES = 256 << 20  # of fp32 logits at a time
NOTHING = -1e30  # logit of no probability; finite: 0 * -inf would be NaN in the entropy
CANDIDATES = 1024  # largest logits of a rank among which the edge of top-p is looked for first


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns of the vocabulary this rank's `weight` [V_padded / tp, h] holds; padding takes no probability, and
    what is outside of `support` what sampling leaves it."""

    vocab_size: int
    rank: int
    group: dist.ProcessGroup
    chunk_bytes: int = CHUNK_BYTES
    support: Support = ALL_TOKENS

    def logits(self, hidden_Ch: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
        """fp32 [C, V_padded / tp], divided by the sampling temperature."""
        logits, first = (hidden_Ch @ weight.t()).float(), self.rank * len(weight)
        banned = [token_id - first for token_id in self.support.banned_token_ids]
        if banned := [column for column in banned if 0 <= column < len(weight)]:
            logits[:, banned] += BANNED_LOGIT_BIAS
        logits.div_(temperature)
        first_padding = self.vocab_size - first
        if first_padding < len(weight):
            logits[:, max(0, first_padding) :] = NOTHING
        return logits

    def cut(self, logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        """In place: what `support` leaves out of top-k and top-p takes no probability.

        A target keeps its own: it was sampled, and at the edge the engine's rounding decides. Logits that equal the last one
        within stay within; of such ties vLLM keeps all (top-k in its PyTorch sampler) or some (the rest).
        """
        if self.support.is_cut:
            local, inside = self.own(targets_C, logits_CV.shape[1])
            chosen = logits_CV.gather(1, local[:, None])
            logits_CV.masked_fill_(logits_CV < self._floor(logits_CV)[:, None], NOTHING)
            cut = logits_CV.gather(1, local[:, None])
            logits_CV.scatter_(1, local[:, None], torch.where(inside[:, None], chosen, cut))
        return logits_CV

    def _floor(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """The least logit within top-k and top-p, [C]."""
        top_k, top_p, num_columns = self.support.top_k, self.support.top_p, logits_CV.shape[1]
        largest = self._largest(logits_CV, min(top_k or CANDIDATES, num_columns))
        if top_k:
            largest = largest[:, :top_k]
            return largest[:, -1] if top_p == 1 else self._last_within(largest, largest.logsumexp(-1))
        normaliser = _normaliser(logits_CV, self)
        held = (largest - normaliser[:, None]).exp_().sum(-1)
        reaches_far = (held < top_p).any().float()
        dist.all_reduce(reaches_far, op=dist.ReduceOp.MAX, group=self.group)  # all ranks go on together
        if not reaches_far or num_columns <= CANDIDATES:
            return self._last_within(largest, normaliser)
        floors = []  # flat distributions: among all, a few rows at a time, since every rank gets all columns
        size = max(1, len(logits_CV) // dist.get_world_size(self.group))
        for part, of_part in zip(logits_CV.split(size), normaliser.split(size)):
            floors.append(self._last_within(self._largest(part, num_columns), of_part))
        return torch.cat(floors)

    def _last_within(self, largest: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
        """Of logits in falling order: the last with less than top-p of the probability before it; the first always is."""
        held = (largest[:, :-1] - normaliser[:, None]).exp_().cumsum(-1)
        return largest.gather(1, (held < self.support.top_p).sum(-1, keepdim=True))[:, 0]

    def _largest(self, logits_CV: torch.Tensor, count: int) -> torch.Tensor:
        """`count` of every rank, in falling order, the same on all [C, ranks * count]."""
        own = logits_CV.topk(count).values
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim=-1).sort(dim=-1, descending=True).values

    def chunks(self, num_rows: int, num_columns: int) -> Iterator[slice]:
        size = max(1, self.chunk_bytes // (4 * num_columns))
        return (slice(start, start + size) for start in range(0, num_rows, size))

    def own(self, targets: torch.Tensor, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the targets in this shard (clamped into it), and whether they are in it."""
        local = targets - self.rank * num_columns
        return local.clamp(0, num_columns - 1), (local >= 0) & (local < num_columns)


class _TargetLogProbs(torch.autograd.Function):
    """forward keeps two numbers a row; backward computes the logits of a chunk again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, shard: VocabularyShard, temperature: float):
        rows = [
            _forward_chunk(shard.cut(shard.logits(hidden[part], weight, temperature), targets[part]), targets[part], shard)
            for part in shard.chunks(len(hidden), len(weight))
        ]
        empty = hidden.new_zeros(3, 0, dtype=torch.float32)
        chosen, normaliser, mean_logit = torch.cat(rows, dim=1) if rows else empty
        ctx.save_for_backward(hidden, weight, targets, normaliser, mean_logit)
        ctx.shard, ctx.temperature = shard, temperature
        return chosen - normaliser, normaliser - mean_logit

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, normaliser, mean_logit = ctx.saved_tensors
        shard, wants_weight = ctx.shard, ctx.needs_input_grad[1]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for part in shard.chunks(len(hidden), len(weight)):
            logits = shard.cut(shard.logits(hidden[part], weight, ctx.temperature), targets[part])
            by_logprob, by_entropy = grad_logprob[part, None], grad_entropy[part, None]
            probability = (logits - normaliser[part, None]).exp_()
            # d entropy / d logit_j = p_j (mean logit - logit_j); d log-prob / d logit_j = [j is the target] - p_j
            grad = logits.neg_().add_(mean_logit[part, None]).mul_(by_entropy).sub_(by_logprob).mul_(probability)
            local, inside = shard.own(targets[part], len(weight))
            grad.scatter_add_(1, local[:, None], by_logprob * inside[:, None])
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[part] = (grad @ weight).float()
            if grad_weight is not None:
                grad_weight += (grad.t() @ hidden[part]).float()
        dist.all_reduce(grad_hidden, group=shard.group)
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _forward_chunk(logits: torch.Tensor, targets: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """-> fp32 [3, C]: the target's logit, log of the sum of exponents, mean logit; over all ranks."""
    peak = logits.max(-1).values
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
    local, inside = shard.own(targets, logits.shape[1])
    chosen = logits.gather(1, local[:, None])[:, 0] * inside
    exponent = (logits - peak[:, None]).exp_()
    sums = torch.stack([chosen, exponent.sum(-1), exponent.mul_(logits).sum(-1)])
    dist.all_reduce(sums, group=shard.group)
    chosen, total, weighted = sums
    return torch.stack([chosen, peak + total.log(), weighted / total])


def target_logprobs(
    hidden_Rh: torch.Tensor, weight: torch.Tensor, targets_R: torch.Tensor, shard: VocabularyShard, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [R, h] (the same on all ranks), weight [V_padded / tp, h], targets int64 [R] -> (log-probs [R],
    entropy [R]) fp32, both differentiable.

    `temperature` is the sampling temperature: log-probs are of the distribution that was sampled from.
    """
    return _TargetLogProbs.apply(hidden_Rh, weight, targets_R, shard, temperature)


class _Divergence(torch.autograd.Function):
    """forward keeps three numbers a row; backward computes the logits of a chunk again, of both policies."""

    @staticmethod
    def forward(ctx, hidden, weight, reference: ReferenceHead, shard: VocabularyShard, temperature: float):
        rows = []
        for part in shard.chunks(len(hidden), len(weight)):
            logits = shard.logits(hidden[part], weight, temperature)
            others = shard.logits(reference.hidden_Rh[part], reference.weight, temperature)
            normaliser, other_normaliser = _normaliser(logits, shard), _normaliser(others, shard)
            log_ratio = logits - normaliser[:, None] - (others - other_normaliser[:, None])
            kl = ((logits - normaliser[:, None]).exp() * log_ratio).sum(-1)
            dist.all_reduce(kl, group=shard.group)
            rows.append(torch.stack([kl, normaliser, other_normaliser]))
        saved = torch.cat(rows, dim=1) if rows else hidden.new_zeros(3, 0, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, reference.hidden_Rh, reference.weight, saved)
        ctx.shard, ctx.temperature = shard, temperature
        return saved[0].clone()

    @staticmethod
    def backward(ctx, grad_kl):
        hidden, weight, other_hidden, other_weight, saved = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in ctx.shard.chunks(len(hidden), len(weight)):
            kl, normaliser, other_normaliser = saved[:, part, None]
            logprobs = ctx.shard.logits(hidden[part], weight, ctx.temperature).sub_(normaliser)
            log_ratio = logprobs - ctx.shard.logits(other_hidden[part], other_weight, ctx.temperature).sub_(other_normaliser)
            # d KL / d logit_j = p_j (log p_j - log q_j - KL)
            grad = log_ratio.sub_(kl).mul_(logprobs.exp_()).mul_(grad_kl[part, None] / ctx.temperature).to(weight.dtype)
            grad_hidden[part] = (grad @ weight).float()
            if grad_weight is not None:
                grad_weight += (grad.t() @ hidden[part]).float()
        dist.all_reduce(grad_hidden, group=ctx.shard.group)
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _normaliser(logits: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """log of the sum of exponents over all ranks' columns, fp32 [C]."""
    peak = logits.max(-1).values
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
    total = (logits - peak[:, None]).exp_().sum(-1)
    dist.all_reduce(total, group=shard.group)
    return peak + total.log_()


def divergence(
    hidden_Rh: torch.Tensor, weight: torch.Tensor, reference: ReferenceHead, shard: VocabularyShard, temperature: float = 1.0
) -> torch.Tensor:
    """KL(policy || reference) over the whole vocabulary at every target, fp32 [R], differentiable."""
    return _Divergence.apply(hidden_Rh, weight, reference, shard, temperature)


class ValueHead(torch.nn.Module):
    """A critic's last layer, hidden [R, h] -> value fp32 [R]; the same on every tensor-parallel rank.

    Starts at zero: the first estimates are 0 and the backbone is first moved when the head has learned something.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))

    def forward(self, hidden_Rh: torch.Tensor) -> torch.Tensor:
        return (hidden_Rh @ self.weight.t()).float()[:, 0]
