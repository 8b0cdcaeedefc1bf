"""Weight rules drawn by hand, and the whole table of random models by brute force.

Not covered: that Megatron and vLLM really lay their parameters out so (tests/distributed and tests/integration compute
with them); Transformer Engine's names of the fused norms beyond their being distinct.
"""

import random

import numpy as np
import pytest

from megatron_agent.models.mapping import Heads, Replicated, Split, Stacked, as_index, pieces
from megatron_agent.models.qwen2 import TextConfig, language_table
from megatron_agent.models.qwen2_5_vl.vision import VisionConfig
from megatron_agent.models.qwen2_5_vl.weights import vision_table
from megatron_agent.training.layout import Layout, megatron_pieces, vllm_pieces


def test_replicated():
    assert Replicated().boxes((3, 2), 1, 4) == [(((0, 3), (0, 2)), ((0, 3), (0, 2)))]


@pytest.mark.parametrize(
    ("rule", "shape", "size", "expected"),
    [
        (Split(0), (4, 3), 2, [(((0, 2), (0, 3)), ((0, 2), (0, 3))), (((2, 4), (0, 3)), ((0, 2), (0, 3)))]),
        (Split(1), (2, 6), 2, [(((0, 2), (0, 3)), ((0, 2), (0, 3))), (((0, 2), (3, 6)), ((0, 2), (0, 3)))]),
        # 10 rows, padded to 16 = 2 ranks x 4 x 2: the second rank holds two rows and six of padding
        (Split(0, 4), (10,), 2, [(((0, 8),), ((0, 8),)), (((8, 10),), ((0, 2),))]),
        # 10 rows, padded to 12 whatever the ranks: six and four
        (Split(0, 4, scale_multiple_by_size=False), (10,), 2, [(((0, 6),), ((0, 6),)), (((6, 10),), ((0, 4),))]),
        (Split(0, 4), (3,), 2, [(((0, 3),), ((0, 3),)), None]),  # only padding on the second rank
    ],
)
def test_split(rule, shape, size, expected):
    assert [rule.boxes(shape, rank, size) for rank in range(size)] == [[box] if box else [] for box in expected]


def test_split_refuses_a_remainder():
    with pytest.raises(ValueError, match="dimension of 5 does not split over 2"):
        Split(0).boxes((5,), 0, 2)


@pytest.mark.parametrize(("length", "size", "padded"), [(320, 1, 384), (320, 2, 512), (512, 4, 512), (513, 4, 1024)])
def test_padded_length(length, size, padded):
    assert Split(0, 128).padded(length, size) == padded


def test_stacked_parts_of_unequal_length():
    # gate 4 rows, up 8 rows, two ranks: a rank holds [2 of gate, 4 of up]
    assert Stacked(0, (4, 8)).boxes((4, 5), 1, 2) == [(((2, 4), (0, 5)), ((0, 2), (0, 5)))]
    assert Stacked(1, (4, 8)).boxes((8, 5), 0, 2) == [(((0, 4), (0, 5)), ((2, 6), (0, 5)))]
    assert Stacked(1, (4, 8)).boxes((8, 5), 1, 2) == [(((4, 8), (0, 5)), ((2, 6), (0, 5)))]


def draw_heads(heads, kv_heads, rank, size, head_dim=1, **options):
    """Labels of the rows of a fused parameter, e.g. "q0 q1 k0 v0"."""
    names = {"q": [f"q{i}" for i in range(heads)]}
    names |= {part: [f"{part}{i}" for i in range(kv_heads)] for part in "kv"}
    rows = {}
    for part in "qkv":
        hf = [label for p in "qkv" for label in names[p]] if options.get("fused_hf") else names[part]
        hf = [label for label in hf for _ in range(head_dim)]
        for (source,), (target,) in Heads(part, heads, kv_heads, head_dim, **options).boxes((len(hf),), rank, size):
            assert source[1] - source[0] == target[1] - target[0]
            for offset in range(source[1] - source[0]):
                assert target[0] + offset not in rows, "two sources for one row"
                rows[target[0] + offset] = hf[source[0] + offset]
    assert sorted(rows) == list(range(len(rows))), "a row that nothing fills"
    return " ".join(rows[i] for i in range(len(rows)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rank", "size", "interleaved", "expected"),
    [
        (4, 2, 0, 1, True, "q0 q1 k0 v0 q2 q3 k1 v1"),
        (4, 2, 0, 1, False, "q0 q1 q2 q3 k0 k1 v0 v1"),
        (4, 2, 1, 2, True, "q2 q3 k1 v1"),
        (4, 2, 1, 2, False, "q2 q3 k1 v1"),
        (8, 4, 1, 2, True, "q4 q5 k2 v2 q6 q7 k3 v3"),
        (8, 4, 1, 2, False, "q4 q5 q6 q7 k2 k3 v2 v3"),
        (3, 3, 0, 1, True, "q0 k0 v0 q1 k1 v1 q2 k2 v2"),
        # more ranks than KV heads: each KV head lies on two ranks
        (8, 2, 0, 4, False, "q0 q1 k0 v0"),
        (8, 2, 1, 4, False, "q2 q3 k0 v0"),
        (8, 2, 2, 4, False, "q4 q5 k1 v1"),
        (8, 2, 3, 4, False, "q6 q7 k1 v1"),
        (8, 1, 3, 4, False, "q6 q7 k0 v0"),
        # Megatron cuts its order of one rank, q0 q1 q2 q3 k0 v0 q4 q5 q6 q7 k1 v1, into even parts
        (8, 2, 0, 4, True, "q0 q1 q2"),
        (8, 2, 1, 4, True, "q3 k0 v0"),
        (8, 2, 3, 4, True, "q7 k1 v1"),
    ],
)
def test_heads(heads, kv_heads, rank, size, interleaved, expected):
    assert draw_heads(heads, kv_heads, rank, size, interleaved=interleaved) == expected


def test_heads_of_two_rows_and_of_a_fused_tensor():
    assert draw_heads(2, 1, 0, 1, head_dim=2, interleaved=True) == "q0 q0 q1 q1 k0 k0 v0 v0"
    assert draw_heads(4, 4, 1, 2, interleaved=False, fused_hf=True) == "q2 q3 k2 k3 v2 v3"


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (Stacked(0, (5, 5)), (5, 2)),
        (Heads("q", 3, 1, 1, interleaved=False), (3,)),
        (Heads("k", 6, 3, 1, interleaved=False), (3,)),
        (Split(0), (5, 2)),
    ],
)
def test_a_remainder_is_refused(rule, shape):
    with pytest.raises(ValueError, match="does not split"):
        rule.boxes(shape, 0, 2)


def random_model(seed, tied):
    rng = random.Random(seed)
    kv_heads = rng.choice([4, 8])
    text = TextConfig(
        hidden_size=rng.choice([6, 8, 10]), intermediate_size=4 * rng.randint(1, 4), num_layers=rng.choice([2, 4]),
        num_heads=kv_heads * rng.randint(1, 3), num_kv_heads=kv_heads, head_dim=rng.choice([2, 3]),
        vocab_size=rng.randint(400, 700), rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=(1,),
        max_position_embeddings=64, tied=tied,
    )  # fmt: skip
    vision = VisionConfig(
        depth=rng.randint(1, 2), hidden_size=8, intermediate_size=4 * rng.randint(1, 3), num_heads=4,
        out_hidden_size=text.hidden_size, patch_size=2, in_channels=3,
    )  # fmt: skip
    return text, vision


def megatron_shapes(text, vision, layout, stage):
    """Parameters of one rank as Megatron-Core 0.16 makes them, written down apart from the table."""
    tp, h, d = layout.tensor_parallel, text.hidden_size, text.head_dim
    vocab = (-(-text.vocab_size // (128 * tp)) * 128, h)
    shapes = {}
    if stage.is_first:
        shapes["language.embedding.word_embeddings.weight"] = vocab
        v, ffn = vision.hidden_size, vision.intermediate_size
        shapes["visual.patch_embed.proj.weight"] = (v, 3, 2, 2, 2)
        for block in range(vision.depth):
            tails = {
                "attn.qkv.weight": (3 * v, v), "attn.qkv.bias": (3 * v,), "attn.proj.weight": (v, v), "attn.proj.bias": (v,),
                "mlp.gate_proj.weight": (ffn, v), "mlp.gate_proj.bias": (ffn,), "mlp.up_proj.weight": (ffn, v),
                "mlp.up_proj.bias": (ffn,), "mlp.down_proj.weight": (v, ffn), "mlp.down_proj.bias": (v,),
                "norm1.weight": (v,), "norm2.weight": (v,),
            }  # fmt: skip
            shapes |= {f"visual.blocks.{block}.{tail}": shape for tail, shape in tails.items()}
        shapes |= {"visual.merger.ln_q.weight": (v,), "visual.merger.mlp.0.weight": (4 * v, 4 * v)}
        shapes |= {
            "visual.merger.mlp.0.bias": (4 * v,),
            "visual.merger.mlp.2.weight": (h, 4 * v),
            "visual.merger.mlp.2.bias": (h,),
        }
    for layer in range(text.num_layers // layout.pipeline_parallel):
        qkv = (text.num_heads + 2 * text.num_kv_heads) * d // tp
        tails = {
            "self_attention.linear_qkv.weight": (qkv, h), "self_attention.linear_qkv.bias": (qkv,),
            "self_attention.linear_proj.weight": (h, text.num_heads * d // tp),
            "mlp.linear_fc1.weight": (2 * text.intermediate_size // tp, h),
            "mlp.linear_fc2.weight": (h, text.intermediate_size // tp),
            "input_layernorm.weight": (h,), "pre_mlp_layernorm.weight": (h,),
        }  # fmt: skip
        shapes |= {f"language.decoder.layers.{layer}.{tail}": shape for tail, shape in tails.items()}
    if stage.is_last:
        shapes["language.decoder.final_layernorm.weight"] = (h,)
        if not text.tied or layout.pipeline_parallel > 1:
            shapes["language.output_layer.weight"] = vocab
    return shapes


def count_elements(all_pieces, shapes):
    """How often each element of the named arrays is covered; `all_pieces`: (name, slice)."""
    counts = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    for name, box in all_pieces:
        counts[name][as_index(box)] += 1
    return counts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_megatron_ranks_hold_everything_once(tp, pp, tied):
    for seed in range(4):
        text, vision = random_model(seed, tied)
        layout = Layout(tp, pp, 1)
        table = language_table(text, pp > 1, transformer_engine=False) + vision_table(vision)
        hf_shapes = {e.hf_name: e.shape for e in table}
        whole_tensors = {e.hf_name for e in table if isinstance(e.rule, Replicated)}
        hf_boxes = []
        for rank in range(layout.world_size):
            stage = layout.stage(layout.coordinates(rank).pipeline, text.num_layers)
            shapes = megatron_shapes(text, vision, layout, stage)
            found = megatron_pieces(table, layout, text.num_layers, rank)
            hf_boxes += [(p.hf_name, p.hf_slice) for p in found]
            for name, count in count_elements([(p.param, p.param_slice) for p in found], shapes).items():
                if name in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
                    real = min(len(count), max(0, text.vocab_size - len(count) * layout.coordinates(rank).tensor))
                    assert (count[:real] == 1).all() and (count[real:] == 0).all(), (seed, rank, name)
                else:
                    assert (count == 1).all(), (seed, rank, name)
        for name, count in count_elements(hf_boxes, hf_shapes).items():
            copies = tp if name in whole_tensors else 1
            if name == "model.embed_tokens.weight" and tied and pp > 1:
                copies = 2  # the head's copy on the last stage
            assert (count == copies).all(), (seed, name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vllm_ranks_hold_everything(tp, tied):
    """Every element on at least one rank and each local row once; KV heads on tp / kv_heads ranks."""
    for seed in range(4):
        text, vision = random_model(seed, tied)
        if tp > 4:
            text = TextConfig(**{**vars(text), "num_heads": 16, "num_kv_heads": 4, "intermediate_size": 16})
            table = language_table(text, False, transformer_engine=False)
        else:
            table = language_table(text, False, transformer_engine=False) + vision_table(vision)
        found = [vllm_pieces(table, tp, rank) for rank in range(tp)]
        whole_tensors = {e.hf_name for e in table if isinstance(e.vllm_rule, Replicated)}
        boxes = [(p.hf_name, p.hf_slice) for of_rank in found for p in of_rank]
        for name, count in count_elements(boxes, {e.hf_name: e.shape for e in table}).items():
            copies = tp if name in whole_tensors else 1
            if "k_proj" in name or "v_proj" in name:
                copies = max(1, tp // text.num_kv_heads)
            assert (count == copies).all(), (seed, name)
        for of_rank in found:
            covered = {}
            for p in of_rank:
                for row in range(*p.param_slice[0]):
                    covered.setdefault(p.param, []).append(row)
            for name, rows in covered.items():
                assert sorted(rows) == list(range(len(rows))), (seed, name)


def test_transformer_engine_holds_the_norms_in_the_projections():
    text, _ = random_model(0, tied=False)
    local = {e.hf_name: e.param for e in language_table(text, False, transformer_engine=False)}
    fused = {e.hf_name: e.param for e in language_table(text, False, transformer_engine=True)}
    layer, hf = "language.decoder.layers.1", "model.layers.1"
    assert {n for n in local if local[n] != fused[n]} == {
        f"model.layers.{i}.{n}.weight" for i in range(text.num_layers) for n in ("input_layernorm", "post_attention_layernorm")
    }
    assert fused[f"{hf}.input_layernorm.weight"] == f"{layer}.self_attention.linear_qkv.layer_norm_weight"
    assert fused[f"{hf}.post_attention_layernorm.weight"] == f"{layer}.mlp.linear_fc1.layer_norm_weight"


def test_pieces_name_both_sides():
    (piece,) = pieces([("hf", (4,), "local", Split(0))], 1, 2)
    assert (piece.hf_name, piece.hf_slice, piece.param, piece.param_slice) == ("hf", ((2, 4),), "local", ((0, 2),))
