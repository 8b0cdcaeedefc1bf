"""Who sends which slice to whom: a pure function of two sets of pieces (mapping table x layout on either side)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import Piece, overlap, shifted, volume
from megatron_agent.types import ShardCopy, Slices


def make_plan(sources: Sequence[Sequence[Piece]], targets: Sequence[Sequence[Piece]]) -> list[ShardCopy]:
    """`sources[rank]`, `targets[rank]`: what every Megatron and every vLLM rank holds -> the copies to make.

    Every element that a vLLM rank holds is sent to it exactly once; where several Megatron ranks hold the same box
    (data-parallel replicas, replicated weights) the one with the least to send so far is taken. Raises
    WeightSyncError naming a vLLM parameter that the Megatron side does not fill completely.
    """
    holders: dict[str, dict[Slices, list[tuple[int, Piece]]]] = defaultdict(lambda: defaultdict(list))
    for rank, pieces in enumerate(sources):
        for piece in pieces:
            holders[piece.hf_name][piece.hf_slice].append((rank, piece))
    sent = [0] * len(sources)
    copies = []
    for dst_rank, pieces in enumerate(targets):
        for want in pieces:
            missing = volume(want.hf_slice)
            for box, candidates in holders.get(want.hf_name, {}).items():
                common = overlap(box, want.hf_slice)
                if common is None:
                    continue
                src_rank, have = min(candidates, key=lambda c: (sent[c[0]], c[0]))
                sent[src_rank] += volume(common)
                missing -= volume(common)
                copies.append(
                    ShardCopy(
                        src_rank,
                        have.param,
                        shifted(common, have.hf_slice, have.param_slice),
                        dst_rank,
                        want.param,
                        shifted(common, want.hf_slice, want.param_slice),
                    )
                )
            if missing:
                raise WeightSyncError(
                    f"vLLM rank {dst_rank} parameter {want.param}: {missing} of {volume(want.hf_slice)} elements of "
                    f"{want.hf_name} are held by no training rank; the two sides are of different models"
                )
    return copies


def to_plain(plan: Sequence[ShardCopy]) -> list[list]:
    """Lists of numbers and names, for messages that carry no classes."""
    return [list(astuple(copy)) for copy in plan]


def from_plain(rows: Sequence[Sequence]) -> list[ShardCopy]:
    def box(bounds: Sequence[Sequence[int]]) -> Slices:
        return tuple((start, stop) for start, stop in bounds)

    return [ShardCopy(r[0], r[1], box(r[2]), r[3], r[4], box(r[5])) for r in rows]
