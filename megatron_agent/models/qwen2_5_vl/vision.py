"""The vision tower of Qwen2.5-VL: windowed and full attention over packed pictures, 2-D rotary, patch merger.

Source: arXiv 2502.13923, section 2.1.1; transformers' modeling_qwen2_5_vl.py defines the behaviour (tests compare).
Parameters bear the Hugging Face names, so that the mapping table is the identity. Weights are replicated.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from megatron_agent.models.attention import packed_attention

Grid = tuple[int, int, int]  # (time, rows, columns) in patches

IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # CLIP's, as in the preprocessor config
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = ()
    in_channels: int = 3

    @property
    def patch_features(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


def patchify(pixels: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Pixels uint8 [H, W, 3], sides multiples of patch x merge -> normalised float32 [patches, patch_features].

    Patches of one merged token are neighbours; a still picture is repeated over the temporal patch.
    """
    patch, merge = config.patch_size, config.spatial_merge_size
    height, width = pixels.shape[:2]
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"picture of {width}x{height} px: both sides must be multiples of {patch * merge}")
    x = (pixels.astype(np.float32) * np.float32(1 / 255) - IMAGE_MEAN) / IMAGE_STD
    rows, columns = height // patch, width // patch
    x = x.transpose(2, 0, 1).reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    x = np.broadcast_to(x, (*x.shape[:5], config.temporal_patch_size, patch, patch))
    return np.ascontiguousarray(x).reshape(rows * columns, config.patch_features)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one matrix product; the weight keeps the convolution's shape."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches_NP: torch.Tensor) -> torch.Tensor:
        return F.linear(patches_NP.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, bounds: tuple[int, ...], cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = (_rotate(t, cos, sin) for t in (q, k))
        return self.proj(packed_attention(q, k, v, bounds, causal=False).flatten(1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.attn, self.mlp = VisionAttention(config), VisionMLP(config)

    def forward(self, x: torch.Tensor, bounds: tuple[int, ...], cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), bounds, cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    """Patches of any number of pictures, back to back -> one feature per merged token, in row order."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches_NP: torch.Tensor, grids: tuple[Grid, ...]) -> torch.Tensor:
        """patches [N, patch_features], one grid per picture -> features [N / merge^2, out_hidden_size]."""
        unit = self.config.spatial_merge_size**2
        layouts = [window_layout(grid, self.config) for grid in grids]
        order, full, windows = _pack_layouts(layouts)
        order_M = torch.as_tensor(order, device=patches_NP.device)
        angles = torch.as_tensor(np.concatenate([a.angles for a in layouts]), device=patches_NP.device)
        x = self.patch_embed(patches_NP)
        x = x.view(-1, unit, x.shape[-1])[order_M].view(x.shape)
        angles = angles.view(-1, unit, angles.shape[-1])[order_M].view(x.shape[0], 1, -1)
        cos, sin = angles.cos(), angles.sin()
        for index, block in enumerate(self.blocks):
            x = block(x, full if index in self.config.fullatt_block_indexes else windows, cos, sin)
        merged = self.merger(x)
        inverse = torch.empty_like(order_M)
        inverse[order_M] = torch.arange(len(order), device=order_M.device)
        return merged[inverse]


@dataclass(frozen=True)
class WindowLayout:
    """One picture's windows. `order` [M]: its merged tokens, window by window; `window_sizes`, `frame_sizes` in patches;
    `angles` float32 [patches, head_dim / 2] in the original order."""

    order: np.ndarray
    window_sizes: tuple[int, ...]
    frame_sizes: tuple[int, ...]
    angles: np.ndarray


@functools.lru_cache(maxsize=4096)
def window_layout(grid: Grid, config: VisionConfig) -> WindowLayout:
    time, rows, columns = grid
    merge = config.spatial_merge_size
    rows_m, columns_m = rows // merge, columns // merge
    side = config.window_size // merge // config.patch_size  # of a window, in merged tokens
    index = np.arange(time * rows_m * columns_m).reshape(time, rows_m, columns_m)
    windows = [
        frame[top : top + side, left : left + side].reshape(-1)
        for frame in index
        for top in range(0, rows_m, side)
        for left in range(0, columns_m, side)
    ]
    head_dim = config.hidden_size // config.num_heads
    frequency = 1.0 / (10000.0 ** (np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2)))
    y, x = np.indices((rows, columns))
    y, x = (p.reshape(rows_m, merge, columns_m, merge).transpose(0, 2, 1, 3).reshape(-1) for p in (y, x))
    angles = np.concatenate([y[:, None] * frequency, x[:, None] * frequency], axis=1).astype(np.float32)
    return WindowLayout(
        order=np.concatenate(windows),
        window_sizes=tuple(len(w) * merge**2 for w in windows),
        frame_sizes=(rows * columns,) * time,
        angles=np.tile(angles, (time, 1)),
    )


def _pack_layouts(layouts: list[WindowLayout]) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """-> order of all merged tokens, segment bounds of full attention, of windowed attention (in patches)."""
    offsets = np.cumsum([0] + [len(a.order) for a in layouts])
    order = np.concatenate([a.order + offset for a, offset in zip(layouts, offsets)])
    full = tuple(np.cumsum([0] + [n for a in layouts for n in a.frame_sizes]).tolist())
    windows = tuple(np.cumsum([0] + [n for a in layouts for n in a.window_sizes]).tolist())
    return order, full, windows
