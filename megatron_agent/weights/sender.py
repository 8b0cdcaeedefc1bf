"""The Megatron side of a round of weight transfer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_agent.types import ShardCopy
from megatron_agent.weights.transport import send_all


def send(module: torch.nn.Module, copies: Sequence[ShardCopy], folder: Path) -> dict[int, str]:
    """This rank's copies to their receivers, who meet it in `folder` -> rollout rank: why it did not get its bytes."""
    return send_all(folder, copies, dict(module.named_parameters()))
