"""Transfer plans by brute force, and their bytes through real files.

Not covered: CUDA IPC and NCCL (not written), vLLM's side of it (tests/integration), shared memory that is full.
"""

import json
import pickle
from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import Piece, Split, as_index, overlap, pieces, shifted, volume
from megatron_agent.models.qwen2 import TextConfig, language_table
from megatron_agent.models.qwen2_5_vl.vision import VisionConfig
from megatron_agent.models.qwen2_5_vl.weights import vision_table
from megatron_agent.training.layout import Layout, megatron_pieces, vllm_pieces
from megatron_agent.types import ShardCopy
from megatron_agent.weights.plan import from_plain, make_plan, to_plain

TEXT = TextConfig(
    hidden_size=6, intermediate_size=8, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=2, vocab_size=333,
    rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=(1,), max_position_embeddings=64, tied=False,
)  # fmt: skip
VISION = VisionConfig(2, hidden_size=4, intermediate_size=6, num_heads=2, out_hidden_size=6, patch_size=2)
MODELS = {
    "untied": (TEXT, VISION),
    "tied": (replace(TEXT, tied=True, num_heads=6, num_kv_heads=2, vocab_size=300), VISION),
}


def table_of(model, layout):
    text, vision = MODELS[model]
    rows = language_table(text, layout.pipeline_parallel > 1, transformer_engine=False, vllm_prefix="language_model.")
    return rows + vision_table(vision), text.num_layers


def random_weights(table):
    """Every element of the whole model is another number."""
    shapes = {e.hf_name: e.shape for e in table}
    order = np.random.default_rng(0).permutation(sum(map(prod, shapes.values()))).astype(np.float32)
    weights, at = {}, 0
    for name, shape in shapes.items():
        weights[name] = torch.from_numpy(order[at : at + prod(shape)].reshape(shape))
        at += prod(shape)
    return weights


def filled(of_rank, weights, empty=float("nan")):
    """The parameters of one rank, from its pieces; what no piece fills stays `empty` (padding)."""
    sizes = {}
    for p in of_rank:
        old = sizes.get(p.param, [0] * len(p.param_slice))
        sizes[p.param] = [max(n, stop) for n, (_, stop) in zip(old, p.param_slice)]
    params = {name: torch.full(size, empty) for name, size in sizes.items()}
    for p in of_rank:
        params[p.param][as_index(p.param_slice)] = weights[p.hf_name][as_index(p.hf_slice)]
    return params


@pytest.mark.parametrize("rollout_tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_element_arrives_once(model, tp, pp, dp, rollout_tp):
    layout = Layout(tp, pp, dp)
    table, num_layers = table_of(model, layout)
    weights = random_weights(table)
    sources = [megatron_pieces(table, layout, num_layers, rank) for rank in range(layout.world_size)]
    targets = [vllm_pieces(table, rollout_tp, rank) for rank in range(rollout_tp)]
    megatron = [filled(of_rank, weights) for of_rank in sources]
    expected = [filled(of_rank, weights, empty=0.0) for of_rank in targets]
    received = [{n: torch.full_like(t, float("nan")) for n, t in params.items()} for params in expected]
    writes = [{n: torch.zeros_like(t, dtype=torch.int) for n, t in params.items()} for params in expected]
    plan = make_plan(sources, targets)
    for c in plan:
        shard = megatron[c.src_rank][c.src_param][as_index(c.src_slice)]
        assert shard.shape == c.shape
        received[c.dst_rank][c.dst_param][as_index(c.dst_slice)] = shard
        writes[c.dst_rank][c.dst_param][as_index(c.dst_slice)] += 1
    for rank in range(rollout_tp):
        for name, tensor in expected[rank].items():
            assert torch.equal(received[rank][name], tensor), (rank, name)
            assert (writes[rank][name] == 1).all(), (rank, name)
    assert ("language_model.lm_head.weight" in expected[0]) == (model == "untied")


def test_vllms_fused_parameters_are_what_vllm_would_load():
    """Against plain concatenation, tensor-parallel rank 1 of 2: vLLM's linear.py, written down apart from the rules."""
    table, _ = table_of("untied", Layout())
    weights = random_weights(table)
    found = filled(vllm_pieces(table, 2, 1), weights)
    hf, ours = "model.layers.1.", "language_model.model.layers.1."

    def second_half(name, dim=0):
        return weights[name].chunk(2, dim)[1]

    qkv = [second_half(f"{hf}self_attn.{p}_proj.weight") for p in "qkv"]
    assert torch.equal(found[f"{ours}self_attn.qkv_proj.weight"], torch.cat(qkv))
    gate_up = [second_half(f"{hf}mlp.{p}_proj.weight") for p in ("gate", "up")]
    assert torch.equal(found[f"{ours}mlp.gate_up_proj.weight"], torch.cat(gate_up))
    assert torch.equal(found[f"{ours}self_attn.o_proj.weight"], second_half(f"{hf}self_attn.o_proj.weight", 1))
    vision = [part.chunk(2)[1] for part in weights["visual.blocks.0.attn.qkv.bias"].chunk(3)]
    assert torch.equal(found["visual.blocks.0.attn.qkv.bias"], torch.cat(vision))
    assert torch.equal(found["language_model.model.embed_tokens.weight"], weights["model.embed_tokens.weight"][192:])  # of 384


def test_megatrons_fused_parameters_are_what_megatron_computes_with():
    """One block [q heads of the group, k, v] per KV head; rank 1 of 2 has groups 2 and 3."""
    table, num_layers = table_of("untied", Layout(2))
    weights = random_weights(table)
    found = filled(megatron_pieces(table, Layout(2), num_layers, 1), weights)
    q, k, v = (weights[f"model.layers.0.self_attn.{p}_proj.weight"].view(-1, 2, 6) for p in "qkv")
    blocks = [q[4], q[5], k[2], v[2], q[6], q[7], k[3], v[3]]
    assert torch.equal(found["language.decoder.layers.0.self_attention.linear_qkv.weight"], torch.cat(blocks))
    fc1 = [weights[f"model.layers.0.mlp.{p}_proj.weight"][4:] for p in ("gate", "up")]
    assert torch.equal(found["language.decoder.layers.0.mlp.linear_fc1.weight"], torch.cat(fc1))


def test_replicas_share_the_sending():
    """Four data-parallel replicas send a quarter each, as near as whole tensors allow."""
    layout = Layout(1, 1, 4)
    table, num_layers = table_of("untied", layout)
    sources = [megatron_pieces(table, layout, num_layers, rank) for rank in range(4)]
    sent = Counter()
    for c in make_plan(sources, [vllm_pieces(table, 1, 0)]):
        sent[c.src_rank] += prod(c.shape)
    largest = max(prod(e.shape) for e in table)
    assert len(sent) == 4 and max(sent.values()) - min(sent.values()) <= largest


def test_a_plan_drawn_by_hand():
    """Six rows on three senders, two receivers."""
    sources = [pieces([("w", (6,), "m", Split(0))], rank, 3) for rank in range(3)]
    targets = [pieces([("w", (6,), "v", Split(0))], rank, 2) for rank in range(2)]
    assert make_plan(sources, targets) == [
        ShardCopy(0, "m", ((0, 2),), 0, "v", ((0, 2),)),
        ShardCopy(1, "m", ((0, 1),), 0, "v", ((2, 3),)),
        ShardCopy(1, "m", ((1, 2),), 1, "v", ((0, 1),)),
        ShardCopy(2, "m", ((0, 2),), 1, "v", ((1, 3),)),
    ]


@pytest.mark.parametrize("source", [[], [Piece("w", ((0, 3),), "m", ((0, 3),))], [Piece("x", ((0, 6),), "m", ((0, 6),))]])
def test_what_no_rank_holds_is_named(source):
    missing = 3 if source and source[0].hf_name == "w" else 6
    with pytest.raises(WeightSyncError, match=f"vLLM rank 0 parameter v: {missing} of 6 elements of w are held by no"):
        make_plan([source], [[Piece("w", ((0, 6),), "v", ((0, 6),))]])


def test_boxes():
    assert overlap(((0, 4), (2, 6)), ((2, 8), (0, 3))) == ((2, 4), (2, 3))
    assert overlap(((0, 4), (0, 2)), ((2, 8), (2, 3))) is None
    assert volume(((2, 4), (2, 5))) == 6 and volume(()) == 1
    assert shifted(((5, 6),), origin=((4, 8),), target=((0, 4),)) == ((1, 2),)


def test_plain_plans_come_back():
    layout = Layout(2, 2, 1)
    table, num_layers = table_of("tied", layout)
    sources = [megatron_pieces(table, layout, num_layers, rank) for rank in range(4)]
    plan = make_plan(sources, [vllm_pieces(table, 2, rank) for rank in range(2)])
    assert from_plain(json.loads(json.dumps(to_plain(plan)))) == plan  # lists for tuples, as messages make them
    assert from_plain(to_plain(plan)) == plan == pickle.loads(pickle.dumps(plan))
