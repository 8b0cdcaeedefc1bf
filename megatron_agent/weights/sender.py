"""The Megatron side of a round of weight transfer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy
from megatron_agent.weights.transport import write_shards


def send(module: torch.nn.Module, plan: Sequence[ShardCopy], rank: int, folder: Path) -> list[int]:
    """Put this rank's part of the plan into `folder` -> checksums, one per copy, in plan order."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        mine = ((c, parameters[c.src_param][as_index(c.src_slice)]) for c in plan if c.src_rank == rank)
        return write_shards(folder, rank, list(mine))
