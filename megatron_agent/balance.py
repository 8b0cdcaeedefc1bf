"""Even shares of unequal work: rows over ranks and micro-batches, pictures over the ranks of a replica."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def split_balanced(lengths: Sequence[int], num_parts: int, indices: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in `num_parts` lists of about equal total length: longest first, to the lightest part (LPT)."""
    heap = [(0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index in sorted(indices if indices is not None else range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(heap)
        parts[part].append(index)
        heapq.heappush(heap, (load + lengths[index], part))
    return [sorted(part) for part in parts]
