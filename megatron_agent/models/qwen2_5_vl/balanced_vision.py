"""Whole pictures spread over the TP x CP ranks of a replica: each rank encodes some, features are exchanged.

The tower's weights are whole on every rank. Under tensor parallelism alone every rank would encode every picture; here
no picture is encoded twice (`replicate` switches back).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_agent.balance import split_balanced
from megatron_agent.models.qwen2_5_vl.vision import Grid, VisionTower


class _ExchangeFeatures(torch.autograd.Function):
    """Features of every rank's pictures -> all features, on every rank.

    Backward: the gradient of a feature is the same on all tensor ranks (Megatron has reduced it) and partial on context
    ranks (each holds other tokens), so it is summed over the context group and each rank takes its own pictures' part.
    """

    @staticmethod
    def forward(ctx, local, sizes, group, context_group):
        ctx.sizes, ctx.group, ctx.context_group = sizes, group, context_group
        padded = local.new_zeros(max(sizes), local.shape[1])
        padded[: local.shape[0]] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        if ctx.context_group.size() > 1:
            dist.all_reduce(grad, group=ctx.context_group)
        return grad.split(ctx.sizes)[ctx.group.rank()], None, None, None


class BalancedVision(VisionTower):
    """The vision tower over the ranks of one replica. `replicate`: every rank encodes every picture instead."""

    replicate = False

    def __init__(self, config) -> None:
        super().__init__(config)
        self._busiest_patches = self._mean_patches = 0.0

    def take_imbalance(self) -> float:
        """Patches of the busiest rank over those of the mean one, summed over the calls since the last time (1: even)."""
        imbalance = self._busiest_patches / self._mean_patches if self._mean_patches else 1.0
        self._busiest_patches = self._mean_patches = 0.0
        return imbalance

    @property
    def is_split(self) -> bool:
        return not self.replicate and parallel_state.get_tensor_and_context_parallel_world_size() > 1

    def forward(self, patches_NP: torch.Tensor, grids: tuple[Grid, ...]) -> torch.Tensor:
        """patches [N, patch_features], one grid per picture -> features [N / merge^2, out_hidden_size] on every rank."""
        if not self.is_split:
            return super().forward(patches_NP, grids)
        group = parallel_state.get_tensor_and_context_parallel_group()
        counts = [time * rows * columns for time, rows, columns in grids]
        parts = split_balanced(counts, group.size())
        loads = [sum(counts[i] for i in part) for part in parts]
        self._busiest_patches += max(loads)
        self._mean_patches += sum(loads) / len(loads)
        pictures = patches_NP.split(counts)
        mine = parts[group.rank()]
        if mine:
            local = super().forward(torch.cat([pictures[i] for i in mine]), tuple(grids[i] for i in mine))
        else:
            # Every rank must take part in the exchange's backward: an empty result that still hangs on the weights.
            local = next(self.parameters()).sum() * patches_NP.new_zeros(0, self.config.out_hidden_size)
        unit = self.config.spatial_merge_size**2
        sizes = [load // unit for load in loads]
        features = _ExchangeFeatures.apply(local, sizes, group, parallel_state.get_context_parallel_group())
        return torch.cat(reorder(features, parts, [count // unit for count in counts]))


def reorder(features: torch.Tensor, parts: list[list[int]], tokens: list[int]) -> list[torch.Tensor]:
    """Rank order -> picture order."""
    pieces = features.split([tokens[i] for part in parts for i in part])
    by_picture = dict(zip((i for part in parts for i in part), pieces))
    return [by_picture[i] for i in range(len(tokens))]
