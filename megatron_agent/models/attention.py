"""Attention over packed rows, segment by segment: the vision tower's everywhere, the language model's on CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F


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

    H query heads share G key and value heads (H a multiple of G). Segments of equal length are computed as one
    batch: rollouts of one task, windows and pictures of one size mostly are.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for start, stop in zip(bounds, bounds[1:]):
        if stop > start:
            by_length[stop - start].append(start)
    outputs, order = [], []
    for length, starts in by_length.items():
        rows = torch.as_tensor(starts, device=query_THD.device)[:, None] + torch.arange(length, device=query_THD.device)
        q, k, v = (x[rows].transpose(1, 2) for x in (query_THD, key_TGD, value_TGD))  # [segments, heads, length, D]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and length > 1, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        order.append(rows.flatten())
    if len(order) == 1 and len(by_length) == 1 and bounds[0] == 0:
        return outputs[0]  # segments of one length lie in order already
    inverse = torch.empty(query_THD.shape[0], dtype=torch.long, device=query_THD.device)
    index = torch.cat(order)
    inverse[index] = torch.arange(index.shape[0], device=index.device)
    return torch.cat(outputs)[inverse]
