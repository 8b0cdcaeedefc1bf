"""The Megatron side of a round of weight transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_agent.types import ShardCopy, SyncRound
from megatron_agent.weights.meeting import Meeting, place
from megatron_agent.weights.transport import send_all

__all__ = ["place", "send"]


def send(
    module: torch.nn.Module, copies: Sequence[ShardCopy], sync_round: SyncRound, only: frozenset[int] | None = None
) -> dict[int, str]:
    """This rank's copies to their receivers (those of `only`) -> rollout rank: why it did not get its bytes."""
    return send_all(Meeting(sync_round), copies, dict(module.named_parameters()), only)
