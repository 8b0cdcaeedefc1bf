"""The Qwen2.5-VL family (arXiv 2502.13923): reads a Hugging Face checkpoint folder, builds Megatron stages of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.models.mapping import Entry
from megatron_agent.models.qwen2 import Qwen2
from megatron_agent.models.qwen2_5_vl.positions import mrope_positions
from megatron_agent.types import ImageRef

if TYPE_CHECKING:
    import torch

    from megatron_agent.models.qwen2_5_vl.vision import VisionConfig
    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.training.layout import Layout

# Folders that transformers 4 saved leave out every key of the vision config that equals the default of its class; the
# published `in_chans` is no key of that class.
VISION_DEFAULTS = dict(
    depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14,
    temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=(7, 15, 23, 31), in_channels=3,
)  # fmt: skip
IMAGE_FRACTION = 0.5  # of a row's tokens that are pictures', in the balance of pipeline stages


class Qwen2_5_VL(Qwen2):
    """Qwen2.5-VL from `path`. Attributes `text` and `vision` hold the sizes."""

    model_type = "qwen2_5_vl"
    vllm_prefix = "language_model."

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        from megatron_agent.models.qwen2_5_vl.vision import VisionConfig

        for key in ("vision_config", "image_token_id"):
            if key not in self.hf_config:
                raise CheckpointError(f"{self.path / 'config.json'}: no {key}")
        vision = VISION_DEFAULTS | self.hf_config["vision_config"]
        sizes = {field.name: vision[field.name] for field in fields(VisionConfig)}
        sizes["fullatt_block_indexes"] = tuple(sizes["fullatt_block_indexes"])
        self.vision: VisionConfig = VisionConfig(**sizes)
        self.image_token_id: int = self.hf_config["image_token_id"]

    def check(self, layout: Layout, rollout_tensor_parallel: int = 1, whole_tower: bool = False) -> None:
        super().check(layout, rollout_tensor_parallel, whole_tower)
        if not whole_tower and self.vision.num_heads % rollout_tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={rollout_tensor_parallel} does not divide the {self.vision.num_heads} attention "
                f"heads of the vision tower; give another, or rollout.mm_encoder_tp_mode=data"
            )

    def stage_costs(self, layout: Layout) -> tuple[float, float]:
        """The tower is whole on every rank and its pictures are spread over them: per rank it costs what its weights do
        times the patches of a token, as a layer costs its weights."""
        vision = self.vision
        unit = vision.spatial_merge_size**2
        block = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
        merger = (vision.hidden_size * unit) ** 2 + vision.hidden_size * unit * vision.out_hidden_size
        first = IMAGE_FRACTION * (unit * vision.depth * block + merger) / self.text.layer_parameters
        return first, super().stage_costs(layout)[1]

    def build_vision(self) -> torch.nn.Module:
        from megatron_agent.models.qwen2_5_vl.balanced_vision import BalancedVision

        return BalancedVision(self.vision)

    def table(self, layout: Layout, transformer_engine: bool, head: str = "policy") -> list[Entry]:
        from megatron_agent.models.qwen2_5_vl.weights import vision_table

        return super().table(layout, transformer_engine, head) + vision_table(self.vision)

    def renderer(self, path: str) -> ChatRenderer:
        from megatron_agent.models.qwen2_5_vl.renderer import Renderer

        return Renderer(path)

    def positions(self, token_ids: Sequence[int], images: Sequence[ImageRef]) -> np.ndarray:
        merge = self.vision.spatial_merge_size
        grids = [(t, rows // merge, columns // merge) for t, rows, columns in map(self.grid, images)]
        return mrope_positions(np.asarray(token_ids), self.image_token_id, grids)

    def patches(self, pixels: np.ndarray) -> np.ndarray:
        from megatron_agent.models.qwen2_5_vl.vision import patchify

        return patchify(pixels, self.vision)

    def grid(self, image: ImageRef) -> tuple[int, int, int]:
        return 1, image.height_px // self.vision.patch_size, image.width_px // self.vision.patch_size


COMPONENT = Qwen2_5_VL
