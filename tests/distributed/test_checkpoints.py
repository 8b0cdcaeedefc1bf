"""Training checkpoints of real ranks, and weights on their way to vLLM.

Not covered: a checkpoint of other hardware, bfloat16 master weights, vLLM's own side (tests/integration).
"""

from threading import Thread

import pytest
import rank_jobs
import torch
from safetensors import safe_open

from megatron_agent.models.mapping import as_index
from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.layout import Layout, megatron_pieces, vllm_pieces
from megatron_agent.weights.meeting import Meeting, MeetingPoint
from megatron_agent.weights.plan import make_plan
from megatron_agent.weights.transport import receive_all

pytestmark = pytest.mark.distributed

TP2, PP2 = Layout(2, 1, 1), Layout(1, 2, 1)
VPP2, CP2 = Layout(pipeline_parallel=2, virtual_pipeline=2), Layout(context_parallel=2)


@pytest.fixture(scope="module")
def saved(ranks, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, ranks.run(2, rank_jobs.save_and_go_on, tiny_models["tied"], TP2, folder)


def losses(results):
    return [sum(s for s, _, _ in step) / sum(n for _, n, _ in step) for step in zip(*results)]


def test_after_a_reload_the_steps_are_bit_equal(saved):
    """The second step sees Adam's moments too."""
    for result in saved[1]:
        assert result["again"] == result["went_on"] and result["went_on"][0] != result["before"][0]


def test_a_new_process_goes_on_bit_equal(saved, ranks, tiny_models):
    results = ranks.run(2, rank_jobs.resume, tiny_models["tied"], TP2, saved[0])
    assert results == [result["went_on"] for result in saved[1]]


@pytest.mark.parametrize("layout", [PP2, VPP2, CP2, Layout()], ids=["pp2", "pp2vpp2", "cp2", "one"])
def test_tp2_loads_into_another_layout(saved, ranks, tiny_models, layout):
    results = ranks.run(layout.world_size, rank_jobs.resume, tiny_models["tied"], layout, saved[0])
    expected = losses([result["went_on"] for result in saved[1]])
    assert losses(results) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("layout", "vllm_tp"), [(Layout(2, 2, 1), 1), (Layout(1, 1, 2), 2)], ids=["tp2pp2 to 1", "dp2 to 2"])
def test_real_shards_arrive_as_the_file_has_them(ranks, tiny_models, layout, vllm_tp):
    family = Qwen2_5_VL(tiny_models["untied"])
    table = family.table(layout, transformer_engine=False)
    sources = [megatron_pieces(table, layout, family.text.num_layers, rank) for rank in range(layout.world_size)]
    targets = [vllm_pieces(table, vllm_tp, rank) for rank in range(vllm_tp)]
    plan, point = make_plan(sources, targets), MeetingPoint()
    sync_round = point.open()
    sinks = [Buffers(pieces) for pieces in targets]
    threads = [
        Thread(target=receive_all, args=(Meeting(sync_round), rank, [c for c in plan if c.dst_rank == rank], sink))
        for rank, sink in enumerate(sinks)
    ]
    for thread in threads:
        thread.start()
    lost = ranks.run(layout.world_size, rank_jobs.send_weights, tiny_models["untied"], layout, plan, sync_round)
    for thread in threads:
        thread.join(60)
    assert lost == [{}] * layout.world_size
    with safe_open(tiny_models["untied"] / "model.safetensors", framework="pt") as reader:
        for sink, pieces in zip(sinks, targets):
            expected = {name: torch.zeros(tensor.shape) for name, tensor in sink.tensors.items()}
            for piece in pieces:
                expected[piece.param][as_index(piece.param_slice)] = reader.get_slice(piece.hf_name)[as_index(piece.hf_slice)]
            for name, tensor in expected.items():
                assert torch.equal(sink.tensors[name], tensor), name


class Buffers:
    """The parameters of a vLLM rank."""

    def __init__(self, pieces):
        sizes = {}
        for piece in pieces:
            sizes[piece.param] = [max(a, b) for a, (_, b) in zip(sizes.get(piece.param, [0] * 9), piece.param_slice)]
        self.tensors = {name: torch.full(size, float("nan")) for name, size in sizes.items()}

    def write(self, copy, values):
        place = self.tensors[copy.dst_param][as_index(copy.dst_slice)]
        return place.copy_(values)

    def written(self, copy):
        pass
