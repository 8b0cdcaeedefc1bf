"""Copies from one rank to another in buckets of bounded size, and the sums by which both sides know that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

import torch

from megatron_agent.types import ShardCopy, Slices


def checksum(tensor: torch.Tensor) -> int:
    """64 bits of a tensor's contents, computed where it lies: the same for equal values of equal shape on any device, in
    any memory layout. Rows are sums of 64-bit words, weighted by odd numbers: a changed word, or swapped rows, show."""
    rows = tensor.detach()
    if rows.shape[-1] * rows.element_size() % 8:  # short ones, in whole models: byte by byte
        rows = rows.contiguous().view(torch.uint8).flatten().long()
    try:
        words = rows.view(torch.int64)
    except RuntimeError:  # odd strides or offset
        words = rows.clone(memory_format=torch.contiguous_format).view(torch.int64)
    words = words[:, None] if words.dim() == 1 else words
    sums = words.sum(-1, dtype=torch.int64).flatten()
    weights = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    return int((sums * weights).sum()) & (1 << 64) - 1


def cut(copy: ShardCopy, max_elements: int) -> Iterator[ShardCopy]:
    """The copy in pieces of at most `max_elements`, along its first dims."""
    if prod(copy.shape) <= max_elements:
        yield copy
        return
    dim = next(d for d, length in enumerate(copy.shape) if length > 1)
    rows = max(1, max_elements // (prod(copy.shape) // copy.shape[dim]))
    for first in range(0, copy.shape[dim], rows):
        last = min(first + rows, copy.shape[dim])
        source, target = (_rows(box, dim, first, last) for box in (copy.src_slice, copy.dst_slice))
        yield from cut(replace(copy, src_slice=source, dst_slice=target), max_elements)


def _rows(box: Slices, dim: int, first: int, last: int) -> Slices:
    return tuple((start + first, start + last) if d == dim else (start, stop) for d, (start, stop) in enumerate(box))


def buckets(copies: Iterable[ShardCopy], max_elements: int) -> list[list[ShardCopy]]:
    """Copies from one rank to another, in order, in lists of at most `max_elements`; both sides cut alike."""
    found: list[list[ShardCopy]] = []
    room = 0
    for copy in (piece for whole in copies for piece in cut(whole, max_elements)):
        if prod(copy.shape) > room:
            found.append([])
            room = max_elements
        found[-1].append(copy)
        room -= prod(copy.shape)
    return found


def views(slot: torch.Tensor, bucket: Sequence[ShardCopy]) -> Iterator[tuple[ShardCopy, torch.Tensor]]:
    """Where in a slot [elements] each copy of the bucket lies."""
    offset = 0
    for copy in bucket:
        count = prod(copy.shape)
        yield copy, slot[offset : offset + count].view(copy.shape)
        offset += count


def num_elements(bucket: Sequence[ShardCopy]) -> int:
    return sum(prod(copy.shape) for copy in bucket)
