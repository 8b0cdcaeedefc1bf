"""Which boxes a vLLM rank needs and which groups of training ranks hold them: said once per group, not per rank.

A group is a set of training ranks with the same bytes (the data- and context-parallel replicas of one tensor- and
pipeline-parallel coordinate), so a template does not grow with the number of GPUs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import Piece, Shape, overlap, shifted, volume
from megatron_agent.types import Slices


class Holding(NamedTuple):
    """Where a group of training ranks has a box."""

    group: int
    param: str
    box: Slices


@dataclass(frozen=True)
class Part:
    """A box of a vLLM parameter and every place to have it from; `position` orders the parts of a vLLM rank."""

    param: str
    box: Slices
    holdings: tuple[Holding, ...]
    position: int = 0

    @cached_property
    def size(self) -> int:
        return volume(self.box)

    @cached_property
    def split_dim(self) -> int:
        return next((dim for dim, (start, stop) in enumerate(self.box) if stop - start > 1), 0)

    @property
    def rows(self) -> int:
        start, stop = self.box[self.split_dim]
        return stop - start

    def rows_of(self, box: Slices, first: int, last: int) -> Slices:
        """Rows [first, last) of `box`, one of the equal-shaped boxes of this part."""
        start = box[self.split_dim][0]
        return tuple((start + first, start + last) if d == self.split_dim else side for d, side in enumerate(box))


@dataclass(frozen=True)
class Lane:
    """All that one set of groups owes to a vLLM tensor-parallel rank, its parts laid end to end; lengths in elements.

    Every group of the set holds all of it: replicated weights lie in several groups, a tied embedding in two.
    """

    groups: tuple[int, ...]
    tensor_rank: int
    parts: tuple[Part, ...]

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(part.size for part in self.parts))

    @property
    def size(self) -> int:
        return self.ends[-1]

    def snap(self, offset: int, min_split: int) -> int:
        """The nearest place where the lane may be cut: between parts, or between rows of one of `min_split` elements."""
        if offset <= 0 or offset >= self.size:
            return max(0, min(offset, self.size))
        index = bisect_right(self.ends, offset)
        part, start = self.parts[index], self.ends[index] - self.parts[index].size
        rows = part.rows if part.size >= min_split else 1
        row = part.size // rows
        return start + row * ((offset - start + row // 2) // row)

    def cut(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Parts and their rows [first, last) between two places where the lane may be cut."""
        index = bisect_right(self.ends, start)
        while index < len(self.parts) and (begin := self.ends[index] - self.parts[index].size) < stop:
            part = self.parts[index]
            row = part.size // part.rows
            yield part, max(0, start - begin) // row, min(part.size, stop - begin) // row
            index += 1


@dataclass(frozen=True)
class Template:
    """`lanes` between groups of training ranks and vLLM tensor-parallel ranks; `shapes[rank]` of the live parameters.

    A live shape is without the padding of a vocabulary; a parameter that is nothing but padding has none.
    """

    lanes: tuple[Lane, ...]
    shapes: tuple[dict[str, Shape], ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Elements that each vLLM tensor-parallel rank receives."""
        sizes = [0] * len(self.shapes)
        for lane in self.lanes:
            sizes[lane.tensor_rank] += lane.size
        return sizes

    @classmethod
    def build(cls, groups: Sequence[Sequence[Piece]], targets: Sequence[Sequence[Piece]]) -> Template:
        """`groups[i]`, `targets[rank]`: what a group of training ranks and a vLLM rank hold.

        Raises WeightSyncError naming a vLLM parameter that the training side does not fill completely.
        """
        held: dict[str, dict[Slices, list[Holding]]] = defaultdict(lambda: defaultdict(list))
        for group, pieces in enumerate(groups):
            for piece in pieces:
                held[piece.hf_name][piece.hf_slice].append(Holding(group, piece.param, piece.param_slice))
        lanes = []
        for rank, pieces in enumerate(targets):
            by_groups: dict[tuple[int, ...], list[Part]] = defaultdict(list)
            for part in _parts(held, pieces, rank):
                by_groups[tuple(h.group for h in part.holdings)].append(part)
            lanes += [Lane(holders, rank, tuple(parts)) for holders, parts in by_groups.items()]
        return cls(tuple(lanes), tuple(live_shapes(pieces) for pieces in targets))


def live_shapes(pieces: Sequence[Piece]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for piece in pieces:
        old = shapes.get(piece.param, (0,) * len(piece.param_slice))
        shapes[piece.param] = tuple(max(n, stop) for n, (_, stop) in zip(old, piece.param_slice))
    return shapes


def _parts(held: dict[str, dict[Slices, list[Holding]]], pieces: Sequence[Piece], rank: int) -> list[Part]:
    """The parts of a vLLM rank, parameter by parameter; neighbours that lie side by side on both sides are one."""
    by_param: dict[str, list[Part]] = defaultdict(list)
    for want in pieces:
        missing = volume(want.hf_slice)
        for box, holdings in held.get(want.hf_name, {}).items():
            common = overlap(box, want.hf_slice)
            if common is None:
                continue
            missing -= volume(common)
            sources = {h.group: h._replace(box=shifted(common, box, h.box)) for h in holdings}  # a group holds it once
            target = shifted(common, want.hf_slice, want.param_slice)
            by_param[want.param].append(Part(want.param, target, tuple(sources[g] for g in sorted(sources))))
        if missing:
            raise WeightSyncError(
                f"vLLM rank {rank} parameter {want.param}: {missing} of {volume(want.hf_slice)} elements of "
                f"{want.hf_name} are held by no training rank; the two sides are of different models"
            )
    merged: list[Part] = []
    for parts in by_param.values():
        for part in parts:
            joined = _joined(merged[-1], part) if merged else None
            if joined:
                merged[-1] = joined
            else:
                merged.append(part)
    return [Part(p.param, p.box, p.holdings, position) for position, p in enumerate(merged)]


def _joined(a: Part, b: Part) -> Part | None:
    """One part for two whose boxes touch along the same dim on every side."""
    if a.param != b.param or [h[:2] for h in a.holdings] != [h[:2] for h in b.holdings]:
        return None
    pairs = [(a.box, b.box), *((x.box, y.box) for x, y in zip(a.holdings, b.holdings))]
    dims = {_touching_dim(x, y) for x, y in pairs}
    dim = dims.pop()
    if dim is None or dims:
        return None
    boxes = [tuple((x0, y1) if d == dim else (x0, x1) for d, ((x0, x1), (_, y1)) in enumerate(zip(x, y))) for x, y in pairs]
    return Part(a.param, boxes[0], tuple(h._replace(box=box) for h, box in zip(a.holdings, boxes[1:])))


def _touching_dim(a: Slices, b: Slices) -> int | None:
    """The one dim in which the boxes differ, if `b` begins there where `a` ends."""
    differ = [dim for dim, (x, y) in enumerate(zip(a, b)) if x != y]
    return differ[0] if len(differ) == 1 and a[differ[0]][1] == b[differ[0]][0] else None
