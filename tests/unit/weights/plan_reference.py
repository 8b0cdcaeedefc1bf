"""What every rank holds of a checkpoint, written from the engines' own code apart from the mapping rules.

Megatron-Core 0.16: transformer/attention.py (QKV by query group), transformer/mlp.py, tensor_parallel/layers.py. vLLM
0.32: model_executor/layers/linear.py, parameter.py, vocab_parallel_embedding.py, models/qwen2_5_vl.py.
"""

import random
from dataclasses import replace
from math import prod

import numpy as np

from megatron_agent.models.qwen2 import TextConfig, language_table
from megatron_agent.models.qwen2_5_vl.vision import VisionConfig
from megatron_agent.models.qwen2_5_vl.weights import vision_table
from megatron_agent.training.layout import Layout
from megatron_agent.weights.plan import RolloutLayout
from megatron_agent.weights.topology import Topology

PADDING = -1


def draw_case(rng: random.Random):
    """A random tiny model with two layouts that fit it, and where the ranks sit."""
    tp, vllm_tp, kv_heads = (rng.choice([1, 2, 4, 8]) for _ in range(3))
    heads = max(tp, vllm_tp, kv_heads) * rng.choice([1, 2, 3])
    chunks = rng.choice([(1, 1), (1, 1), (2, 1), (3, 1), (2, 2)])
    layers = chunks[0] * chunks[1] + rng.randint(0, 2)
    text = TextConfig(
        hidden_size=rng.choice([2, 3, 4]), intermediate_size=8 * rng.randint(1, 3), num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=4, vocab_size=rng.randint(40, 300), rms_norm_eps=1e-6, rope_theta=1e4,
        mrope_section=(1,), max_position_embeddings=64, tied=rng.random() < 0.5,
    )  # fmt: skip
    vision = VisionConfig(1, 16, 8 * rng.randint(1, 2), 8, text.hidden_size, patch_size=2) if rng.random() < 0.6 else None
    layout = Layout(tp, chunks[0], rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2]), virtual_pipeline=chunks[1])
    if rng.random() < 0.5:
        uneven = [1] * layout.num_chunks
        for _ in range(layers - layout.num_chunks):
            uneven[rng.randrange(layout.num_chunks)] += 1
        layout = replace(layout, stage_layers=tuple(uneven))
    rollout = RolloutLayout(vllm_tp, rng.choice([1, 1, 2, 3, 5, 9]), rng.choice(["weights", "data"]))
    topology = Topology.regular(
        layout.world_size, rollout.world_size, rng.choice([1, 2, 4, 8]), rng.random() < 0.5, rng.choice([1, 400]),
    )  # fmt: skip
    topology = replace(topology, bucket_bytes=rng.choice([256, 1 << 12]), hop_latency_s=rng.choice([0, 1e-5]))
    return text, vision, layout, rollout, topology


def table_of(text, vision, layout, transformer_engine=False):
    prefix = "language_model." if vision else ""
    rows = language_table(text, layout.pipeline_parallel > 1, transformer_engine, prefix)
    return rows + (vision_table(vision) if vision else [])


def random_weights(table, seed=0):
    """Every element of the whole model is another number."""
    shapes = {e.hf_name: e.shape for e in table}
    numbers = np.random.default_rng(seed).permutation(sum(map(prod, shapes.values())))
    weights, at = {}, 0
    for name, shape in shapes.items():
        weights[name] = numbers[at : at + prod(shape)].reshape(shape)
        at += prod(shape)
    return weights


def _chunk(tensor, size, rank, dim=0):
    return np.split(tensor, size, dim)[rank]


def _padded(embedding, multiple):
    rows = -len(embedding) % multiple
    return np.concatenate([embedding, np.full((rows, embedding.shape[1]), PADDING)])


def megatron_shard(weights, text, layout, rank):
    """Parameters of one training rank (local layer spec), by the names of the model or, with chunks, of their list."""
    at, tp = layout.coordinates(rank), layout.tensor_parallel
    shard = {}
    for chunk in range(layout.virtual_pipeline):
        stage = layout.stage(at.pipeline, text.num_layers, chunk)
        params = {}
        if stage.is_first:
            params["language.embedding.word_embeddings.weight"] = _chunk(
                _padded(weights["model.embed_tokens.weight"], 128 * tp), tp, at.tensor
            )
            params |= {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}
        for local, layer in enumerate(range(stage.first_layer, stage.last_layer)):
            for name, tensor in _megatron_layer(weights, text, f"model.layers.{layer}.", tp, at.tensor).items():
                params[f"language.decoder.layers.{local}.{name}"] = tensor
        if stage.is_last:
            params["language.decoder.final_layernorm.weight"] = weights["model.norm.weight"]
            head = weights["model.embed_tokens.weight" if text.tied else "lm_head.weight"]
            if not (text.tied and stage.is_first):
                params["language.output_layer.weight"] = _chunk(_padded(head, 128 * tp), tp, at.tensor)
        prefix = f"{chunk}." if layout.virtual_pipeline > 1 else ""
        shard |= {prefix + name: tensor for name, tensor in params.items()}
    return shard


def _megatron_layer(weights, text, hf, tp, rank):
    params = {
        "input_layernorm.weight": weights[f"{hf}input_layernorm.weight"],
        "pre_mlp_layernorm.weight": weights[f"{hf}post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": _chunk(weights[f"{hf}self_attn.o_proj.weight"], tp, rank, 1),
        "mlp.linear_fc2.weight": _chunk(weights[f"{hf}mlp.down_proj.weight"], tp, rank, 1),
        "mlp.linear_fc1.weight": np.concatenate(
            [_chunk(weights[f"{hf}mlp.{part}_proj.weight"], tp, rank) for part in ("gate", "up")]
        ),
    }
    for kind in ("weight", "bias"):
        q, k, v = (weights[f"{hf}self_attn.{part}_proj.{kind}"] for part in "qkv")
        groups = [t.reshape(text.num_kv_heads, -1, *t.shape[1:]) for t in (q, k, v)]  # a query group: its q heads, k, v
        fused = np.concatenate(groups, 1).reshape(-1, *q.shape[1:])
        params[f"self_attention.linear_qkv.{kind}"] = _chunk(fused, tp, rank)
    return params


def vllm_shard(weights, text, rollout, rank):
    """Live parameters of one vLLM rank, vocabularies without their padding."""
    tp = rollout.tensor_parallel
    has_vision = any(name.startswith("visual.") for name in weights)
    prefix = "language_model." if has_vision else ""
    heads = ["embed_tokens"] if text.tied else ["embed_tokens", "lm_head"]
    params = {f"{prefix}model.norm.weight": weights["model.norm.weight"]}
    for head in heads:
        name = "lm_head.weight" if head == "lm_head" else "model.embed_tokens.weight"
        local = _chunk(_padded(weights[name], 64), tp, rank)
        live = local[: (local[:, 0] != PADDING).sum()]
        if len(live):
            params[prefix + name] = live
    for layer in range(text.num_layers):
        for name, tensor in _vllm_layer(weights, text, f"model.layers.{layer}.", tp, rank).items():
            params[f"{prefix}model.layers.{layer}.{name}"] = tensor
    if has_vision:
        params |= _vllm_vision(weights, *((1, 0) if rollout.mm_encoder_tp_mode == "data" else (tp, rank)))
    return params


def _vllm_layer(weights, text, hf, tp, rank):
    kv_size = min(tp, text.num_kv_heads)
    kv_rank = rank // (tp // kv_size)  # num_kv_head_replicas ranks hold one head
    params = {
        "input_layernorm.weight": weights[f"{hf}input_layernorm.weight"],
        "post_attention_layernorm.weight": weights[f"{hf}post_attention_layernorm.weight"],
        "self_attn.o_proj.weight": _chunk(weights[f"{hf}self_attn.o_proj.weight"], tp, rank, 1),
        "mlp.down_proj.weight": _chunk(weights[f"{hf}mlp.down_proj.weight"], tp, rank, 1),
        "mlp.gate_up_proj.weight": np.concatenate(
            [_chunk(weights[f"{hf}mlp.{part}_proj.weight"], tp, rank) for part in ("gate", "up")]
        ),
    }
    for kind in ("weight", "bias"):
        q, k, v = (weights[f"{hf}self_attn.{part}_proj.{kind}"] for part in "qkv")
        params[f"self_attn.qkv_proj.{kind}"] = np.concatenate(
            [_chunk(q, tp, rank), _chunk(k, kv_size, kv_rank), _chunk(v, kv_size, kv_rank)]
        )
    return params


def _vllm_vision(weights, tp, rank):
    params = {}
    for name, tensor in weights.items():
        if not name.startswith("visual."):
            continue
        if ".attn.qkv." in name:
            params[name] = np.concatenate([_chunk(part, tp, rank) for part in np.split(tensor, 3)])
        elif ".mlp.gate_proj." in name:
            both = (tensor, weights[name.replace("gate_proj", "up_proj")])
            params[name.replace("gate_proj", "gate_up_proj")] = np.concatenate([_chunk(part, tp, rank) for part in both])
        elif ".mlp.up_proj." in name:
            continue
        elif name.startswith("visual.merger.mlp.0."):
            params[name] = _chunk(tensor, tp, rank)
        elif name.endswith((".attn.proj.weight", ".mlp.down_proj.weight", "merger.mlp.2.weight")):
            params[name] = _chunk(tensor, tp, rank, 1)
        else:
            params[name] = tensor
    return params
