"""The Qwen2.5-VL family (arXiv 2502.13923): reads a Hugging Face checkpoint folder, builds Megatron stages of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.models.base import ModelFamily, StageSpec
from megatron_agent.models.mapping import Entry, Split
from megatron_agent.models.qwen2_5_vl.positions import mrope_positions
from megatron_agent.types import ImageRef

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig

    from megatron_agent.models.qwen2_5_vl.vision import VisionConfig
    from megatron_agent.models.qwen2_5_vl.weights import TextConfig
    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.training.layout import Layout


def read_config(path: Path) -> dict:
    """config.json of a Qwen2.5-VL folder; raises CheckpointError naming what is wrong with the folder."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; model.path must be a Hugging Face Qwen2.5-VL folder")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if config.get("model_type") != "qwen2_5_vl":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, expected 'qwen2_5_vl'")
    if not list(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: no *.safetensors file beside config.json")
    return config


class Qwen2_5_VL(ModelFamily):
    """Qwen2.5-VL from `path`. Attributes `text` and `vision` hold the sizes."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        from megatron_agent.models.qwen2_5_vl.vision import VisionConfig
        from megatron_agent.models.qwen2_5_vl.weights import TextConfig

        hf = read_config(self.path)
        text = hf.get("text_config", hf)  # published checkpoints keep the text's keys at the top level
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        heads = text["num_attention_heads"]
        self.text: TextConfig = TextConfig(
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocab_size=text["vocab_size"],
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
            mrope_section=tuple(rope["mrope_section"]),
            max_position_embeddings=text["max_position_embeddings"],
            tied=bool(hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )
        vision = hf["vision_config"]
        self.vision: VisionConfig = VisionConfig(
            depth=vision["depth"],
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_heads=vision["num_heads"],
            out_hidden_size=vision["out_hidden_size"],
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            spatial_merge_size=vision["spatial_merge_size"],
            window_size=vision["window_size"],
            fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
            in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        )
        self.image_token_id: int = hf["image_token_id"]

    def check(self, layout: Layout, rollout_tensor_parallel: int = 1) -> None:
        tp, pp = layout.tensor_parallel, layout.pipeline_parallel
        for what, count in (
            ("attention heads", self.text.num_heads),
            ("key/value heads", self.text.num_kv_heads),
            ("intermediate size", self.text.intermediate_size),
        ):
            if count % tp:
                raise ConfigError(
                    f"training.tensor_parallel={tp} does not divide the model's {what} ({count}); "
                    f"choose one of {[n for n in range(1, count + 1) if count % n == 0][:8]}"
                )
        if self.text.num_heads % rollout_tensor_parallel or self.vision.num_heads % rollout_tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={rollout_tensor_parallel} does not divide the model's attention heads "
                f"({self.text.num_heads} in the language model, {self.vision.num_heads} in the vision tower)"
            )
        if self.text.num_layers % layout.num_chunks:
            raise ConfigError(
                f"training.pipeline_parallel={pp} x training.virtual_pipeline={layout.virtual_pipeline} does not divide the "
                f"model's {self.text.num_layers} layers"
            )

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        from megatron_agent.models.qwen2_5_vl.weights import MEGATRON_VOCAB_MULTIPLE

        return Split(0, MEGATRON_VOCAB_MULTIPLE).padded(self.text.vocab_size, tensor_parallel)

    def transformer_config(self, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
        import torch
        from megatron.core.transformer import TransformerConfig

        text, on_gpu = self.text, torch.cuda.is_available()
        return TransformerConfig(
            num_layers=text.num_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.intermediate_size,
            num_attention_heads=text.num_heads,
            num_query_groups=text.num_kv_heads,
            kv_channels=text.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=text.rms_norm_eps,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            attention_softmax_in_fp32=True,
            mrope_section=list(text.mrope_section),
            tensor_model_parallel_size=layout.tensor_parallel,
            pipeline_model_parallel_size=layout.pipeline_parallel,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            overlap_p2p_comm=layout.virtual_pipeline > 1,
            batch_p2p_comm=layout.virtual_pipeline == 1,  # batched, interleaved chunks receive one another's tensors on gloo
            context_parallel_size=layout.context_parallel,
            sequence_parallel=layout.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=not on_gpu,
            perform_initialization=False,  # every parameter is read from the checkpoint
            persist_layer_norm=on_gpu,
            masked_softmax_fusion=on_gpu,
            bias_activation_fusion=on_gpu,
            bias_dropout_fusion=on_gpu,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
        )

    def build(self, config: TransformerConfig, stage: StageSpec, chunk: int | None = None) -> torch.nn.Module:
        from megatron_agent.models.qwen2_5_vl.language import Qwen2_5_VLStage

        return Qwen2_5_VLStage(
            config,
            stage,
            self.vision,
            self.image_token_id,
            self.padded_vocab_size(config.tensor_model_parallel_size),
            self.text.rope_theta,
            self.text.max_position_embeddings,
            self.text.tied,
            chunk,
        )

    def table(self, layout: Layout, transformer_engine: bool) -> list[Entry]:
        from megatron_agent.models.qwen2_5_vl.weights import language_table, vision_table

        return language_table(self.text, layout.pipeline_parallel > 1, transformer_engine) + vision_table(self.vision)

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
