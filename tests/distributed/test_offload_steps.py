"""Models that leave their memory between steps, on real ranks: the same bits as those that stay.

Not covered: CUDA (pinned copies, the caching allocator, NCCL streams), optimizers other than Adam.
"""

import pytest
import rank_jobs_offload

from megatron_agent.training.layout import Layout

pytestmark = pytest.mark.distributed

CASES = {
    "tp2 float32": (Layout(2, 1, 1), "float32", "all"),
    "pp2 bfloat16": (Layout(1, 2, 1), "bfloat16", "all"),
    "dp2 bfloat16": (Layout(1, 1, 2), "bfloat16", "all"),
    "pp2 vpp2 float32": (Layout(pipeline_parallel=2, virtual_pipeline=2), "float32", "all"),
    "dp2 float32, optimizer only": (Layout(1, 1, 2), "float32", "optimizer"),
}


@pytest.mark.parametrize(("layout", "dtype", "what"), CASES.values(), ids=CASES)
def test_the_steps_are_bit_equal_to_those_of_a_model_that_stays(ranks, tiny_models, layout, dtype, what):
    for staying, leaving in ranks.run(2, rank_jobs_offload.stay_and_leave, tiny_models["tied"], layout, dtype, what):
        assert len({str(round["step"]) for round in leaving}) == 3
        for number, (stay, leave) in enumerate(zip(staying, leaving)):
            assert leave["step"] == stay["step"] and leave["logprobs"] == stay["logprobs"]
            assert leave["same"] and leave["zeros"] and all(g > 0 for g in leave["gradients"])
            assert stay["freed"] == 0 and stay["left"] == stay["full"] == leave["full"]
            parameters = leave["full"]["parameters"]
            kept = parameters if what == "optimizer" else 0
            assert leave["left"] == leave["after"] == {"parameters": kept, "gradients": 0, "optimizer": 0}
            assert leave["between"] == {"parameters": parameters, "gradients": 0, "optimizer": 0}
            assert leave["freed"] == sum(leave["full"].values()) - kept and leave["twice"] == 0
            # fp32 masters are views of the parameters, bf16's are tensors of their own; the moments come with step 1.
            assert (leave["full"]["optimizer"] > 0) == (dtype == "bfloat16" or number > 0)


def test_checkpoints_and_new_optimizers_of_an_offloaded_model(ranks, tiny_models, tmp_path):
    for result in ranks.run(2, rank_jobs_offload.checkpoint_and_new_optimizer, tiny_models["tied"], Layout(1, 1, 2), tmp_path):
        assert result["again"] == result["went_on"] and result["left"] == 0
        assert result["reset"][0] == result["reset"][1] != result["again"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_tensor_is_forgotten(ranks, tiny_models, dtype):
    ((takes, freed, left),) = ranks.run(1, rank_jobs_offload.forgotten_bytes, tiny_models["untied"], Layout(), dtype)
    assert freed > 0.98 * takes and left < 0.01 * takes


def test_use_of_an_offloaded_model_is_refused_by_name(ranks, tiny_models):
    (texts,) = ranks.run(1, rank_jobs_offload.use_while_away, tiny_models["tied"], Layout())
    assert texts["none", "parameters"] == texts["none", "all"] == texts["optimizer", "parameters"] == ""
    begin, end = (
        "rank 0: {} of the model are offloaded to host memory; bring them back first:",
        "`with offload.on_device('all')`",
    )
    assert texts["all", "parameters"].startswith(begin.format("parameters"))
    assert texts["optimizer", "all"].startswith(begin.format("gradients and optimizer"))
    assert texts["all", "all"].startswith(begin.format("parameters and gradients and optimizer"))
    assert texts["all", "all"].endswith(end)


def test_an_offloaded_model_says_so(ranks, tiny_models):
    ((update, logprobs),) = ranks.run(1, rank_jobs_offload.step_while_away, tiny_models["tied"])
    assert "parameters and gradients of the model are offloaded" in update and "to_device('all')" in update
    assert "to_device('parameters')" in logprobs
