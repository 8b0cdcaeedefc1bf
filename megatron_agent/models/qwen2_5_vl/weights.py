"""The vision half of Qwen2.5-VL's mapping table: how each Hugging Face tensor lies in Megatron and in vLLM."""

from __future__ import annotations

from megatron_agent.models.mapping import Entry, Heads, Replicated, Rule, Shape, Split, Stacked
from megatron_agent.models.qwen2 import entry
from megatron_agent.models.qwen2_5_vl.vision import VisionConfig


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
