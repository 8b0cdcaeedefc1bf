"""Attention over packed rows, segment by segment: the vision tower's everywhere, the language model's on CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

MAX_RUNS = 64  # launches of a kernel per call; beyond, gathering costs less


def packed_attention(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    bounds: Sequence[int],
    *,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention inside each segment [bounds[i], bounds[i + 1]) of T packed tokens -> [T, H, D].

    H query heads share G key and value heads (H a multiple of G). Neighbours of equal length are computed as one batch,
    where they lie; where that makes many batches (windows and their rims) all segments of one length are gathered.
    """
    runs = _runs(bounds)
    if len(runs) > MAX_RUNS:
        return _gathered_attention(query_THD, key_TGD, value_TGD, bounds, causal, scale)
    outputs = []
    for start, length, count in runs:
        q, k, v = (x[start : start + length * count].unflatten(0, (count, length)) for x in (query_THD, key_TGD, value_TGD))
        outputs.append(_attention(q, k, v, causal, scale).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, length, number) of neighbouring segments of equal length."""
    runs: list[tuple[int, int, int]] = []
    for start, stop in zip(bounds, bounds[1:]):
        if stop > start:
            first, length, count = runs[-1] if runs else (start, 0, 0)
            if length == stop - start:
                runs[-1] = (first, length, count + 1)
            else:
                runs.append((start, stop - start, 1))
    return runs


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    """[segments, length, heads, D] -> the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped, several = q.shape[1] != k.shape[1], q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and several, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _gathered_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Sequence[int], causal: bool, scale: float | None
) -> torch.Tensor:
    by_length: dict[int, list[int]] = defaultdict(list)
    for start, stop in zip(bounds, bounds[1:]):
        if stop > start:
            by_length[stop - start].append(start)
    outputs, order = [], []
    for length, starts in by_length.items():
        rows = torch.as_tensor(starts, device=query.device)[:, None] + torch.arange(length, device=query.device)
        outputs.append(_attention(query[rows], key[rows], value[rows], causal, scale).flatten(0, 1))
        order.append(rows.flatten())
    inverse = torch.empty(query.shape[0], dtype=torch.long, device=query.device)
    index = torch.cat(order)
    inverse[index] = torch.arange(index.shape[0], device=index.device)
    return torch.cat(outputs)[inverse]


def context_index(bounds: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Indices int64 [T / size] of the tokens that context-parallel rank `rank` holds of a packed row.

    Every segment is cut into 2 x size chunks, of which a rank takes chunk `rank` and its mirror image, so that all ranks
    have as much to attend to (Megatron-Core's `get_batch_on_this_cp_rank`, per segment as Transformer Engine's THD has it).
    """
    if size == 1:
        return torch.arange(bounds[-1])
    parts = []
    for start, stop in zip(bounds, bounds[1:]):
        chunk, left = divmod(stop - start, 2 * size)
        if left:
            raise ValueError(f"a segment of {stop - start} tokens does not split into {2 * size} chunks")
        for first in (start + rank * chunk, start + (2 * size - 1 - rank) * chunk):
            parts.append(torch.arange(first, first + chunk))
    return torch.cat(parts)


class _GatherTokens(torch.autograd.Function):
    """Rows of all ranks of a group, stacked in rank order; backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, local, group):
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def context_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Sequence[int],
    group: dist.ProcessGroup,
    scale: float | None,
) -> torch.Tensor:
    """Causal packed attention of the tokens that this rank holds to all tokens of the row: [T / cp, H, D].

    `bounds` are of the whole row. Keys and values of all ranks are gathered; on GPUs Transformer Engine passes them on
    in a ring instead.
    """
    size, rank = group.size(), group.rank()
    order = torch.cat([context_index(bounds, r, size) for r in range(size)])
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    back = back.to(query.device)
    key, value = (_GatherTokens.apply(x, group)[back] for x in (key, value))
    outputs, at = [], 0
    for start, stop in zip(bounds, bounds[1:]):
        mine = context_index((0, stop - start), rank, size).to(query.device)
        q = query[at : at + len(mine)].transpose(0, 1)[None]
        k, v = (x[start:stop].transpose(0, 1)[None] for x in (key, value))
        mask = mine[:, None] >= torch.arange(stop - start, device=query.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out[0].transpose(0, 1))
        at += len(mine)
    return torch.cat(outputs)
