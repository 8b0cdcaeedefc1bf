"""The mapping table of Qwen2.5-VL: how each Hugging Face tensor lies in Megatron's and in vLLM's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_agent.models.mapping import Entry, Heads, Replicated, Rule, Shape, Split, Stacked
from megatron_agent.models.qwen2_5_vl.vision import VisionConfig

MEGATRON_VOCAB_MULTIPLE = 128  # per TP rank, Megatron's make-vocab-size-divisible-by
VLLM_VOCAB_MULTIPLE = 64  # of the whole vocabulary, vLLM's DEFAULT_VOCAB_PADDING_SIZE


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
    mrope_section: tuple[int, ...]
    max_position_embeddings: int
    tied: bool


def entry(hf_name: str, shape: Shape, param: str, rule: Rule, stage: str | int, vllm: str | None, vllm_rule: Rule) -> Entry:
    return Entry(hf_name, shape, param, rule, stage, vllm, vllm_rule)


def language_table(text: TextConfig, copy_of_tied_head: bool, transformer_engine: bool) -> list[Entry]:
    """`copy_of_tied_head`: with tied weights and several stages, the last stage holds a copy of the embedding.
    `transformer_engine`: its fused layers hold the norm before a projection under the projection's name."""
    h, vocab = text.hidden_size, Split(0, MEGATRON_VOCAB_MULTIPLE)
    vllm_vocab = Split(0, VLLM_VOCAB_MULTIPLE, scale_multiple_by_size=False)
    whole, embed = Replicated(), (text.vocab_size, h)
    rows = [
        entry("model.embed_tokens.weight", embed, "language.embedding.word_embeddings.weight", vocab, "first",
              "language_model.model.embed_tokens.weight", vllm_vocab),
        entry("model.norm.weight", (h,), "language.decoder.final_layernorm.weight", whole, "last",
              "language_model.model.norm.weight", whole),
    ]  # fmt: skip
    if not text.tied:
        rows.append(entry("lm_head.weight", embed, "language.output_layer.weight", vocab, "last",
                          "language_model.lm_head.weight", vllm_vocab))  # fmt: skip
    elif copy_of_tied_head:
        rows.append(entry("model.embed_tokens.weight", embed, "language.output_layer.weight", vocab, "last", None, vllm_vocab))
    for layer in range(text.num_layers):
        rows += _layer(text, layer, transformer_engine)
    return rows


def _layer(text: TextConfig, layer: int, transformer_engine: bool) -> list[Entry]:
    h, ffn, d = text.hidden_size, text.intermediate_size, text.head_dim
    hf, mg, vl = f"model.layers.{layer}", f"language.decoder.layers.{layer}", f"language_model.model.layers.{layer}"
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


def vision_table(vision: VisionConfig) -> list[Entry]:
    """Megatron holds the tower whole on every rank of the first stage; vLLM splits it over its TP ranks."""
    h, ffn, merged = vision.hidden_size, vision.intermediate_size, vision.hidden_size * vision.spatial_merge_size**2
    d = h // vision.num_heads
    whole, rows = Replicated(), []

    def add(name: str, shape: Shape, vllm_name: str, rule: Rule) -> None:
        rows.append(entry(f"visual.{name}", shape, f"visual.{name}", whole, "first", f"visual.{vllm_name}", rule))

    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    add("patch_embed.proj.weight", (h, *kernel), "patch_embed.proj.weight", whole)
    for block in range(vision.depth):
        b = f"blocks.{block}"
        for kind, tail in (("weight", (h,)), ("bias", ())):
            for part in "qkv":
                add(f"{b}.attn.qkv.{kind}", (3 * h, *tail), f"{b}.attn.qkv.{kind}",
                    Heads(part, vision.num_heads, vision.num_heads, d, interleaved=False, fused_hf=True))  # fmt: skip
            for index, name in enumerate(("gate_proj", "up_proj")):
                add(f"{b}.mlp.{name}.{kind}", (ffn, *tail), f"{b}.mlp.gate_up_proj.{kind}", Stacked(index, (ffn, ffn)))
        add(f"{b}.attn.proj.weight", (h, h), f"{b}.attn.proj.weight", Split(1))
        add(f"{b}.attn.proj.bias", (h,), f"{b}.attn.proj.bias", whole)
        add(f"{b}.mlp.down_proj.weight", (h, ffn), f"{b}.mlp.down_proj.weight", Split(1))
        add(f"{b}.mlp.down_proj.bias", (h,), f"{b}.mlp.down_proj.bias", whole)
        for norm in ("norm1", "norm2"):
            add(f"{b}.{norm}.weight", (h,), f"{b}.{norm}.weight", whole)
    add("merger.ln_q.weight", (h,), "merger.ln_q.weight", whole)
    add("merger.mlp.0.weight", (merged, merged), "merger.mlp.0.weight", Split(0))
    add("merger.mlp.0.bias", (merged,), "merger.mlp.0.bias", Split(0))
    add("merger.mlp.2.weight", (vision.out_hidden_size, merged), "merger.mlp.2.weight", Split(1))
    add("merger.mlp.2.bias", (vision.out_hidden_size,), "merger.mlp.2.bias", whole)
    return rows
