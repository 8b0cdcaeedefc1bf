"""The Qwen2 and Qwen2.5 text family (arXiv 2407.10671, 2412.15115), and the text half of Qwen2.5-VL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_agent.errors import CheckpointError, ConfigError, DataError
from megatron_agent.models.base import ModelFamily, StageSpec
from megatron_agent.models.mapping import VALUE_HEAD, Entry, Heads, Replicated, Rule, Shape, Split, Stacked
from megatron_agent.types import ImageRef

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig

    from megatron_agent.models.renderer import ChatRenderer
    from megatron_agent.training.layout import Layout

MEGATRON_VOCAB_MULTIPLE = 128  # per TP rank, Megatron's make-vocab-size-divisible-by
VLLM_VOCAB_MULTIPLE = 64  # of the whole vocabulary, vLLM's DEFAULT_VOCAB_PADDING_SIZE
TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
TARGET_FRACTION = 0.25  # of a row's tokens that meet the head, in the balance of pipeline stages


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]  # one section of all pairs: text positions only
    max_position_embeddings: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Matrix weights of one decoder layer: what its time is proportional to."""
        qkv = self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        return qkv + self.num_heads * self.head_dim * self.hidden_size + 3 * self.hidden_size * self.intermediate_size


def read_config(path: Path, model_type: str) -> dict:
    """config.json of a folder of this type; raises CheckpointError naming what is wrong with it."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; model.path must be a Hugging Face folder of a {model_type} model")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise CheckpointError(f"{path}: model_type is {found!r}, expected {model_type!r}; model.family names the family")
    return config


def read_text_config(hf: dict, path: Path) -> TextConfig:
    """Sizes from a config.json, the text's keys in `text_config` or, as in published checkpoints, at the top level.

    Raises CheckpointError for a missing key and for what the model here does not do: scaled rotary positions, sliding
    windows.
    """
    text = hf.get("text_config", hf)
    for key in TEXT_KEYS:
        if key not in text:
            raise CheckpointError(f"{path / 'config.json'}: no {key}")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"{path}: rope of type {kind!r} is not supported; allowed: default, mrope")
    if text.get("use_sliding_window"):
        raise CheckpointError(f"{path}: use_sliding_window is true; only full attention is supported")
    theta = rope.get("rope_theta") or text.get("rope_theta")
    if not theta:
        raise CheckpointError(f"{path / 'config.json'}: no rope_theta")
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return TextConfig(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=float(theta),
        mrope_section=tuple(rope.get("mrope_section") or (head_dim // 2,)),
        max_position_embeddings=text["max_position_embeddings"],
        tied=bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def entry(hf_name: str, shape: Shape, param: str, rule: Rule, stage: str | int, vllm: str | None, vllm_rule: Rule) -> Entry:
    return Entry(hf_name, shape, param, rule, stage, vllm, vllm_rule)


def language_table(text: TextConfig, copy_of_tied_head: bool, transformer_engine: bool, vllm_prefix: str = "") -> list[Entry]:
    """How each Hugging Face tensor of the decoder lies in Megatron's and in vLLM's parameters.

    `copy_of_tied_head`: with tied weights and several stages, the last stage holds a copy of the embedding.
    `transformer_engine`: its fused layers hold the norm before a projection under the projection's name.
    """
    h, vocab = text.hidden_size, Split(0, MEGATRON_VOCAB_MULTIPLE)
    vllm_vocab = Split(0, VLLM_VOCAB_MULTIPLE, scale_multiple_by_size=False)
    whole, embed = Replicated(), (text.vocab_size, h)
    rows = [
        entry("model.embed_tokens.weight", embed, "language.embedding.word_embeddings.weight", vocab, "first",
              f"{vllm_prefix}model.embed_tokens.weight", vllm_vocab),
        entry("model.norm.weight", (h,), "language.decoder.final_layernorm.weight", whole, "last",
              f"{vllm_prefix}model.norm.weight", whole),
    ]  # fmt: skip
    if not text.tied:
        rows.append(entry("lm_head.weight", embed, HEAD_PARAM, vocab, "last", f"{vllm_prefix}lm_head.weight", vllm_vocab))
    elif copy_of_tied_head:
        rows.append(entry("model.embed_tokens.weight", embed, HEAD_PARAM, vocab, "last", None, vllm_vocab))
    for layer in range(text.num_layers):
        rows += _layer(text, layer, transformer_engine, vllm_prefix)
    return rows


HEAD_PARAM = "language.output_layer.weight"


def _layer(text: TextConfig, layer: int, transformer_engine: bool, vllm_prefix: str) -> list[Entry]:
    h, ffn, d = text.hidden_size, text.intermediate_size, text.head_dim
    hf, mg, vl = f"model.layers.{layer}", f"language.decoder.layers.{layer}", f"{vllm_prefix}model.layers.{layer}"
    whole, rows = Replicated(), []
    for part, heads in (("q", text.num_heads), ("k", text.num_kv_heads), ("v", text.num_kv_heads)):
        ours = Heads(part, text.num_heads, text.num_kv_heads, d, interleaved=True)
        theirs = Heads(part, text.num_heads, text.num_kv_heads, d, interleaved=False)
        for kind, shape in (("weight", (heads * d, h)), ("bias", (heads * d,))):
            rows.append(entry(f"{hf}.self_attn.{part}_proj.{kind}", shape, f"{mg}.self_attention.linear_qkv.{kind}", ours,
                              layer, f"{vl}.self_attn.qkv_proj.{kind}", theirs))  # fmt: skip
    for index, name in enumerate(("gate_proj", "up_proj")):
        stacked = Stacked(index, (ffn, ffn))
        rows.append(entry(f"{hf}.mlp.{name}.weight", (ffn, h), f"{mg}.mlp.linear_fc1.weight", stacked, layer,
                          f"{vl}.mlp.gate_up_proj.weight", stacked))  # fmt: skip
    columns = Split(1)
    norms = (f"{mg}.input_layernorm.weight", f"{mg}.pre_mlp_layernorm.weight")
    if transformer_engine:
        norms = (f"{mg}.self_attention.linear_qkv.layer_norm_weight", f"{mg}.mlp.linear_fc1.layer_norm_weight")
    rows += [
        entry(f"{hf}.self_attn.o_proj.weight", (h, text.num_heads * d), f"{mg}.self_attention.linear_proj.weight", columns,
              layer, f"{vl}.self_attn.o_proj.weight", columns),
        entry(f"{hf}.mlp.down_proj.weight", (h, ffn), f"{mg}.mlp.linear_fc2.weight", columns, layer,
              f"{vl}.mlp.down_proj.weight", columns),
        entry(f"{hf}.input_layernorm.weight", (h,), norms[0], whole, layer,
              f"{vl}.input_layernorm.weight", whole),
        entry(f"{hf}.post_attention_layernorm.weight", (h,), norms[1], whole, layer,
              f"{vl}.post_attention_layernorm.weight", whole),
    ]  # fmt: skip
    return rows


class Qwen2(ModelFamily):
    """Qwen2 or Qwen2.5 from `path`. Attribute `text` holds the sizes."""

    model_type = "qwen2"
    vllm_prefix = ""
    image_token_id: int | None = None

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.hf_config = read_config(self.path, self.model_type)
        self.text: TextConfig = read_text_config(self.hf_config, self.path)

    @property
    def num_layers(self) -> int:
        return self.text.num_layers

    def check(self, layout: Layout, rollout_tensor_parallel: int = 1, whole_tower: bool = False) -> None:
        text, tp = self.text, layout.tensor_parallel
        for what, count in (("attention heads", text.num_heads), ("intermediate size", text.intermediate_size)):
            if count % tp:
                raise ConfigError(
                    f"training.tensor_parallel={tp} does not divide the model's {what} ({count}); "
                    f"choose one of {[n for n in range(1, count + 1) if count % n == 0][:8]}"
                )
        for name, degree in (("training", tp), ("rollout", rollout_tensor_parallel)):
            if text.num_kv_heads % degree and degree % text.num_kv_heads:
                raise ConfigError(
                    f"{name}.tensor_parallel={degree} neither divides the model's key/value heads ({text.num_kv_heads}) "
                    f"nor is a multiple of them"
                )
        if (text.num_heads + 2 * text.num_kv_heads) * text.head_dim % tp:
            raise ConfigError(f"training.tensor_parallel={tp} does not divide the rows of the model's QKV projection")
        if text.num_heads % rollout_tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={rollout_tensor_parallel} does not divide the model's {text.num_heads} "
                f"attention heads"
            )
        layout.check_layers(text.num_layers)

    def stage_costs(self, layout: Layout) -> tuple[float, float]:
        head = self.padded_vocab_size(layout.tensor_parallel) * self.text.hidden_size
        return 0.0, TARGET_FRACTION * head / self.text.layer_parameters

    def padded_vocab_size(self, tensor_parallel: int) -> int:
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
            pipeline_model_parallel_layout=layout.megatron_stages(text.num_layers),
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

    def build(
        self, config: TransformerConfig, stage: StageSpec, chunk: int | None = None, head: str = "policy"
    ) -> torch.nn.Module:
        from megatron_agent.models.decoder import DecoderConfig, DecoderStage

        text = self.text
        decoder = DecoderConfig(
            vocab_size=text.vocab_size,
            padded_vocab_size=self.padded_vocab_size(config.tensor_model_parallel_size),
            rope_theta=text.rope_theta,
            max_positions=text.max_position_embeddings,
            tied=text.tied,
            image_token_id=self.image_token_id,
            head=head,
        )
        return DecoderStage(config, stage, decoder, self.build_vision() if stage.is_first else None, chunk)

    def build_vision(self) -> torch.nn.Module | None:
        return None

    def table(self, layout: Layout, transformer_engine: bool, head: str = "policy") -> list[Entry]:
        several_stages = layout.pipeline_parallel > 1
        rows = language_table(self.text, several_stages and head == "policy", transformer_engine, self.vllm_prefix)
        if head == "policy":
            return rows
        value = entry(VALUE_HEAD, (1, self.text.hidden_size), VALUE_HEAD, Replicated(), "last", None, Replicated())
        return [row for row in rows if row.param != HEAD_PARAM] + [value]

    def renderer(self, path: str) -> ChatRenderer:
        from megatron_agent.models.qwen2_5_vl.renderer import TextRenderer  # the tokenizers are one family

        return TextRenderer(path)

    def positions(self, token_ids: Sequence[int], images: Sequence[ImageRef]) -> np.ndarray:
        if images:
            self.grid(images[0])
        return np.tile(np.arange(len(token_ids)), (3, 1))

    def patches(self, pixels: np.ndarray) -> np.ndarray:
        raise DataError(f"{self.path}: a {self.model_type} model takes no pictures")

    def grid(self, image: ImageRef) -> tuple[int, int, int]:
        raise DataError(f"{self.path}: a {self.model_type} model takes no pictures; the row has one ({image.key})")


COMPONENT = Qwen2
