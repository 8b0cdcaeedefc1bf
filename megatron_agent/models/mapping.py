"""Weight rules: how one Hugging Face tensor lies in the parameters of one rank, said once per tensor and engine.

A `Piece` equates a box of an HF tensor with a box of a local parameter. Loading a checkpoint, writing one and the
Megatron -> vLLM transfer plan are all intersections of pieces, so nothing else in the project knows how QKV is
interleaved or where gate and up lie. Conventions: Megatron-Core 0.16 (attention.py, mlp.py), vLLM 0.32 (linear.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol

from megatron_agent.types import Slices

Shape = tuple[int, ...]
VALUE_HEAD = "value_head.weight"  # a critic's last layer, which a policy's checkpoint lacks: it starts at zero


@dataclass(frozen=True)
class Piece:
    """`param[param_slice]` of a local parameter holds `hf[hf_slice]` of a Hugging Face tensor; equal shapes."""

    hf_name: str
    hf_slice: Slices
    param: str
    param_slice: Slices


class Rule(Protocol):
    """Where the boxes of an HF tensor of `shape` lie on tensor-parallel rank `rank` of `size`."""

    def boxes(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]: ...


def _whole(shape: Shape) -> Slices:
    return tuple((0, n) for n in shape)


def _rows(shape: Shape, hf: tuple[int, int], local: tuple[int, int], dim: int = 0) -> tuple[Slices, Slices]:
    full = list(_whole(shape))
    a, b = list(full), list(full)
    a[dim], b[dim] = hf, local
    return tuple(a), tuple(b)


def _refuse_remainder(what: str, length: int, size: int) -> None:
    if length % size:
        raise ValueError(f"{what} of {length} does not split over {size} tensor-parallel ranks")


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    def boxes(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]:
        return [(_whole(shape), _whole(shape))]


@dataclass(frozen=True)
class Split:
    """Split evenly on `dim`; `multiple` > 0: the dim is padded first to a multiple of `multiple` x size (vocabulary).

    The padding belongs to no HF tensor and stays as the engine initialised it.
    """

    dim: int
    pad_to_multiple_of: int = 0
    scale_multiple_by_size: bool = True

    def padded(self, length: int, size: int) -> int:
        if not self.pad_to_multiple_of:
            _refuse_remainder("a dimension", length, size)
            return length
        multiple = self.pad_to_multiple_of * (size if self.scale_multiple_by_size else 1)
        padded = -(-length // multiple) * multiple
        _refuse_remainder("a padded vocabulary", padded, size)
        return padded

    def boxes(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]:
        per_rank = self.padded(shape[self.dim], size) // size
        start, stop = per_rank * rank, min(per_rank * (rank + 1), shape[self.dim])
        if start >= stop:
            return []
        return [_rows(shape, (start, stop), (0, stop - start), self.dim)]


@dataclass(frozen=True)
class Stacked:
    """One of several tensors stacked on dim 0 of a fused parameter (gate_up_proj, linear_fc1), each split over ranks.

    `part` of `sizes` (full lengths on dim 0 of every part, in order).
    """

    part: int
    sizes: tuple[int, ...]

    def boxes(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]:
        for length in self.sizes:
            _refuse_remainder("a dimension", length, size)
        per_rank = shape[0] // size
        offset = sum(self.sizes[: self.part]) // size
        return [_rows(shape, (per_rank * rank, per_rank * (rank + 1)), (offset, offset + per_rank))]


@dataclass(frozen=True)
class Heads:
    """Q, K and V of grouped-query attention: where `part` ("q", "k" or "v") of a fused parameter lies.

    `interleaved`: Megatron's order, one block [q heads of the group, k, v] per KV head; else vLLM's [all q, all k, all
    v]. With more ranks than KV heads vLLM holds each KV head on size / num_kv_heads ranks; Megatron cuts the rows of its
    order evenly, wherever that falls, and gathers the activations (attention.py, get_query_key_value_tensors).
    `fused_hf`: the HF tensor is itself [all q, all k, all v] (the vision tower).
    """

    part: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    interleaved: bool
    fused_hf: bool = False

    def boxes(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]:
        heads, kv_heads, d = self.num_heads, self.num_kv_heads, self.head_dim
        _refuse_remainder("a number of heads", heads, size)
        if size % kv_heads:  # else each KV head lies on size / kv_heads ranks
            _refuse_remainder("a number of KV heads", kv_heads, size)
        if self.interleaved and size > kv_heads:
            return self._even_rows(shape, rank, size)
        local_heads, local_kv = heads // size, max(1, kv_heads // size)
        first_kv = rank * kv_heads // size
        ratio = local_heads // local_kv  # q heads beside one k in this rank's blocks
        base = {"q": 0, "k": heads, "v": heads + kv_heads}[self.part] if self.fused_hf else 0
        boxes = []
        for block in range(local_kv):
            if self.part == "q":
                source, count = rank * local_heads + block * ratio, ratio
                target = block * (ratio + 2) if self.interleaved else block * ratio
            else:
                source, count = first_kv + block, 1
                after_q = {"k": 0, "v": 1}[self.part]
                target = block * (ratio + 2) + ratio + after_q if self.interleaved else local_heads + after_q * local_kv + block
            start = (base + source) * d
            boxes.append(_rows(shape, (start, start + count * d), (target * d, (target + count) * d)))
        return boxes

    def _even_rows(self, shape: Shape, rank: int, size: int) -> list[tuple[Slices, Slices]]:
        """The boxes of one rank's share of rows in Megatron's order of a single rank."""
        per_rank = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim // size
        boxes = []
        for hf, whole in self.boxes(shape, 0, 1):
            (first, _), (start, stop) = hf[0], whole[0]
            low, high = max(start, rank * per_rank), min(stop, (rank + 1) * per_rank)
            if low < high:
                rows = (first + low - start, first + high - start)
                boxes.append(_rows(shape, rows, (low - rank * per_rank, high - rank * per_rank)))
        return boxes


@dataclass(frozen=True)
class Entry:
    """One row of a family's table: an HF tensor, its shape, and where it lies in a Megatron and in a vLLM rank.

    `stage`: which pipeline stages hold it: "first", "last", or the index of a decoder layer.
    `vllm_param` None: vLLM holds no such parameter (a tied head).
    """

    hf_name: str
    shape: Shape
    param: str
    rule: Rule
    stage: str | int
    vllm_param: str | None
    vllm_rule: Rule


def pieces(entries: Iterable[tuple[str, Shape, str, Rule]], rank: int, size: int) -> list[Piece]:
    """(HF name, shape, local parameter, rule) rows -> the pieces of one tensor-parallel rank."""
    return [
        Piece(name, hf, param, local) for name, shape, param, rule in entries for hf, local in rule.boxes(shape, rank, size)
    ]


def as_index(slices: Slices) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in slices)


def overlap(a: Slices, b: Slices) -> Slices | None:
    box = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b))
    return box if all(start < stop for start, stop in box) else None


def volume(box: Slices) -> int:
    return prod(stop - start for start, stop in box)


def shifted(box: Slices, origin: Slices, target: Slices) -> Slices:
    """`box` in the coordinates of `origin`'s tensor -> in those of `target`'s (the two are equal-shaped boxes)."""
    return tuple((t0 + b0 - o0, t0 + b1 - o0) for (b0, b1), (o0, _), (t0, _) in zip(box, origin, target))
