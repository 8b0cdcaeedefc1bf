"""Samples -> micro-batches: rows packed to a token budget, balanced over data-parallel ranks; tensors built per rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_agent.balance import split_balanced
from megatron_agent.models.base import ModelFamily
from megatron_agent.types import ImageRef, MicroBatch, TrainSample

Pixels = Callable[[ImageRef], np.ndarray]


def plan_microbatches(
    lengths: Sequence[int], max_tokens: int, num_data_parallel: int, min_microbatches: int = 1
) -> list[list[list[int]]]:
    """-> plan[dp rank][micro-batch] = sample indices. Every rank gets the same number of micro-batches.

    The pipeline schedule and the gradient reduction need equal counts: a rank with less to do ends with empty ones, which
    `build_microbatch` makes rows of padding. Fewer micro-batches than `min_microbatches` when there are fewer rows.
    Raises ValueError when a row alone exceeds `max_tokens`.
    """
    if max(lengths, default=0) > max_tokens:
        raise ValueError(f"a row of {max(lengths)} tokens exceeds max_tokens_per_microbatch={max_tokens}")
    ranks = split_balanced(lengths, num_data_parallel)
    packed = [first_fit_decreasing(lengths, max_tokens, rank) for rank in ranks]
    most_rows = max(len(rank) for rank in ranks)
    count = max(1, min(min_microbatches, most_rows), *(len(batches) for batches in packed))
    plan = []
    for rank, batches in zip(ranks, packed):
        even = split_balanced(lengths, min(count, len(rank)), rank)
        fits = all(sum(lengths[i] for i in batch) <= max_tokens for batch in even)
        chosen = even if fits else batches  # first fit always keeps the budget, even parts take less memory
        plan.append([*chosen, *([] for _ in range(count - len(chosen)))])
    return plan


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int, indices: Sequence[int]) -> list[list[int]]:
    """Indices in few lists of at most `max_tokens`: longest first, each into the first list that has room."""
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        at = next((b for b, left in enumerate(room) if left >= lengths[index]), len(batches))
        if at == len(batches):
            batches.append([])
            room.append(max_tokens)
        batches[at].append(index)
        room[at] -= lengths[index]
    return [sorted(batch) for batch in batches]


def padded_length(num_tokens: int, multiple: int) -> int:
    return -(-num_tokens // multiple) * multiple


def _pad_end(values: np.ndarray, length: int) -> np.ndarray:
    """Zeros behind the last dim of [..., T] up to `length`."""
    padding = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return np.pad(values, padding)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenated; int64 [0] of none."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def keep_targets(batch: MicroBatch, kept_R: torch.Tensor) -> MicroBatch:
    """The same row with only the targets of `kept_R` (bool [R]): those that a context-parallel rank holds."""
    per_target = {name: value for name, value in vars(batch).items() if name.endswith("_R") and value is not None}
    return replace(batch, **{name: value[kept_R] for name, value in per_target.items()})


def build_microbatch(
    samples: Sequence[TrainSample],
    sample_ids: Sequence[int],
    family: ModelFamily,
    pixels: Pixels | None,
    pad_to: int = 0,
    segment_multiple: int = 1,
) -> MicroBatch:
    """Tensors of one packed row. Every sample is padded at its end to a multiple of `segment_multiple` tokens (causal
    attention hides that), and `pad_to` > T appends a segment of padding; no target refers to either. No samples: a row
    of nothing but padding. `pixels` None: without the patches, which only the first stage of a pipeline needs."""
    if not sample_ids:
        pad_to = max(pad_to, segment_multiple, 1)
    rows = [samples[i] for i in sample_ids]
    lengths = [padded_length(row.num_tokens, segment_multiple) for row in rows]
    offsets = np.cumsum([0, *lengths])
    positions = [_pad_end(family.positions(row.token_ids_T, row.images), n) for row, n in zip(rows, lengths)]
    targets = [np.flatnonzero(np.asarray(row.action_mask_T)) for row in rows]
    if any(len(t) and t[0] == 0 for t in targets):
        raise ValueError("the first token of a row cannot be an action: nothing predicts it")
    tokens = [_pad_end(np.asarray(row.token_ids_T), n) for row, n in zip(rows, lengths)]
    bounds = list(offsets)
    if pad_to > offsets[-1]:
        padding = pad_to - int(offsets[-1])
        tokens.append(np.zeros(padding, dtype=np.int64))
        positions.append(np.zeros((3, padding), dtype=np.int64))
        bounds.append(pad_to)
    images = [ref for row in rows for ref in row.images] if pixels is not None else []
    patches = np.concatenate([family.patches(pixels(ref)) for ref in images]) if pixels is not None and images else None

    def gather(values: list[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(_joined([np.asarray(v)[t] for v, t in zip(values, targets)]), dtype=dtype)

    def gather_if_all(values: list[list[float] | None]) -> torch.Tensor | None:
        known = [v for v in values if v is not None]
        return gather(known, torch.float32) if len(known) == len(values) else None  # type: ignore[arg-type]

    return MicroBatch(
        token_ids_T=torch.from_numpy(np.concatenate(tokens)),
        position_ids_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        target_positions_R=torch.from_numpy(_joined([t + o - 1 for t, o in zip(targets, offsets)])),
        target_ids_R=torch.from_numpy(_joined([token[t] for token, t in zip(tokens, targets)])),
        sample_index_R=torch.from_numpy(_joined([np.full(len(t), i) for i, t in enumerate(targets)])),
        advantages_R=gather([row.advantages_T for row in rows], torch.float32),
        rollout_logprobs_R=gather([row.rollout_logprobs_T for row in rows], torch.float32),
        old_logprobs_R=gather_if_all([row.old_logprobs_T for row in rows]),
        after_image_R=gather([row.has_image_before_T for row in rows], torch.bool),
        patches_NP=None if patches is None else torch.from_numpy(patches),
        grids_I3=torch.tensor([family.grid(ref) for ref in images], dtype=torch.int64) if images else None,
        sample_ids=list(sample_ids),
        old_values_R=gather_if_all([row.values_T for row in rows]),
        returns_R=gather_if_all([row.returns_T for row in rows]),
        reference_logprobs_R=gather_if_all([row.reference_logprobs_T for row in rows]),
        lag_R=gather([row.lag_T or [0] * row.num_tokens for row in rows], torch.int64),
    )
