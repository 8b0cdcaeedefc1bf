"""Ranks and coordinates. That Megatron numbers its ranks alike is checked in tests/distributed/test_parity.py."""

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.models.base import StageSpec
from megatron_agent.models.mapping import Entry, Replicated, Split
from megatron_agent.training.layout import (
    Coordinates,
    Layout,
    holds,
    is_tensor_parallel,
    megatron_pieces,
    split_layers,
    vllm_pieces,
)


def test_tensor_is_fastest_then_data_then_pipeline():
    layout = Layout(tensor_parallel=2, pipeline_parallel=2, data_parallel=3)
    assert layout.world_size == 12
    found = [layout.coordinates(rank) for rank in range(12)]
    assert [(at.tensor, at.data, at.pipeline) for at in found] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (1, 2, 0),
        (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 2, 1), (1, 2, 1),
    ]  # fmt: skip
    assert Layout().coordinates(0) == Coordinates(0, 0, 0)


@pytest.mark.parametrize("rank", [-1, 2])
def test_ranks_outside_the_world(rank):
    with pytest.raises(ValueError, match=f"rank {rank} outside a world of 2"):
        Layout(2).coordinates(rank)


@pytest.mark.parametrize("name", ["tensor_parallel", "pipeline_parallel", "data_parallel"])
def test_degrees_below_one(name):
    with pytest.raises(ConfigError, match=f"training.{name}=0"):
        Layout(**{name: 0})


def test_stages():
    layout = Layout(pipeline_parallel=3)
    assert [layout.stage(i, 6) for i in range(3)] == [
        StageSpec(0, 2, True, False),
        StageSpec(2, 4, False, False),
        StageSpec(4, 6, False, True),
    ]
    assert Layout().stage(0, 6) == StageSpec(0, 6, True, True)


@pytest.mark.parametrize(
    ("num_layers", "num_chunks", "first", "last", "expected"),
    [
        (8, 4, 0, 0, (2, 2, 2, 2)),
        (7, 3, 0, 0, (2, 2, 3)),
        (28, 2, 4, 0, (12, 16)),
        (28, 4, 5.4, 1, (3, 8, 9, 8)),
        (4, 4, 9, 9, (1, 1, 1, 1)),  # each has one, whatever it carries
        (8, 2, 0, 3, (5, 3)),
    ],
)
def test_layers_are_dealt_by_what_stages_carry_besides(num_layers, num_chunks, first, last, expected):
    assert split_layers(num_layers, num_chunks, first, last) == expected and sum(expected) == num_layers


def test_uneven_stages():
    layout = Layout(pipeline_parallel=2, virtual_pipeline=2, stage_layers=(1, 2, 3, 1))
    assert [layout.stage(rank, 7, chunk) for chunk in (0, 1) for rank in (0, 1)] == [
        StageSpec(0, 1, True, False),
        StageSpec(1, 3, False, False),
        StageSpec(3, 6, False, False),
        StageSpec(6, 7, False, True),
    ]
    stages = layout.megatron_stages(7)
    assert stages == [["embedding", "decoder"], ["decoder"] * 2, ["decoder"] * 3, ["decoder", "loss"]]
    assert Layout().megatron_stages(7) is None


def entry(name, stage, rule, vllm="same"):
    return Entry(name, (4, 2), f"x.layers.{stage}.{name}", rule, stage, vllm and f"v.{name}", Split(0))


TABLE = [
    entry("emb", "first", Replicated()),
    *(entry(f"w{i}", i, Split(0)) for i in range(4)),
    entry("head", "last", Split(0), vllm=None),
]


def test_a_stage_holds_its_layers_and_ends():
    first, last = StageSpec(0, 2, True, False), StageSpec(2, 4, False, True)
    assert [e.hf_name for e in TABLE if holds(e, first)] == ["emb", "w0", "w1"]
    assert [e.hf_name for e in TABLE if holds(e, last)] == ["w2", "w3", "head"]


def test_layers_are_numbered_from_0_in_each_stage():
    layout = Layout(tensor_parallel=2, pipeline_parallel=2)
    found = megatron_pieces(TABLE, layout, 4, rank=3)  # tensor 1, pipeline 1
    assert [(p.hf_name, p.param) for p in found] == [
        ("w2", "x.layers.0.w2"),
        ("w3", "x.layers.1.w3"),
        ("head", "x.layers.last.head"),
    ]
    assert all(p.hf_slice == ((2, 4), (0, 2)) and p.param_slice == ((0, 2), (0, 2)) for p in found)
    assert [p.hf_name for p in megatron_pieces(TABLE, layout, 4, rank=0)] == ["emb", "w0", "w1"]
    assert {p.hf_name: is_tensor_parallel(p, TABLE) for p in megatron_pieces(TABLE, layout, 4, rank=0)} == {
        "emb": False, "w0": True, "w1": True,
    }  # fmt: skip


def test_vllm_holds_no_tied_head():
    assert [p.hf_name for p in vllm_pieces(TABLE, 2, 0)] == ["emb", "w0", "w1", "w2", "w3"]
