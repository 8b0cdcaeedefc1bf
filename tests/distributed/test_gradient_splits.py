"""One batch, split over ranks, micro-batches and packed rows: every algorithm's loss, and the gradient of every parameter,
are the same as of rows that are taken one at a time on one rank. A new file in algorithms/ is tested by being there.

Tensor ranks compare the parameters that they hold whole, pipeline ranks the loss alone (their gradients: test_parity.py).
Not covered: bfloat16.
"""

import pytest
import rank_jobs_gradients

from megatron_agent import registry
from megatron_agent.training.layout import Layout

pytestmark = pytest.mark.distributed

LIMIT = 1e-5  # of the largest entry of a parameter's gradient
LAYOUTS = {
    "one": Layout(),
    "dp2": Layout(data_parallel=2),
    "cp2": Layout(context_parallel=2),
    "tp2": Layout(tensor_parallel=2),
    "pp2": Layout(pipeline_parallel=2),
    "dp2cp2": Layout(data_parallel=2, context_parallel=2),
}
BUDGETS = (52, 90, 10_000)  # tokens of a micro-batch: a row or two, some, all; algorithms take them in turn
CASES = {name: (layout, BUDGETS) for name, layout in LAYOUTS.items()}
CASES["dp2cp2, other budgets"] = (LAYOUTS["dp2cp2"], BUDGETS[::-1])


@pytest.fixture(scope="module")
def expected(ranks, tiny_models, tmp_path_factory):
    file = tmp_path_factory.mktemp("gradients") / "expected.safetensors"
    ((logprobs, losses),) = ranks.run(1, rank_jobs_gradients.write_expected, tiny_models["tied"], file)
    return file, logprobs, losses


@pytest.mark.parametrize(("layout", "budgets"), CASES.values(), ids=CASES)
def test_loss_and_gradient_are_the_same_for_every_split(ranks, tiny_models, expected, layout, budgets):
    file, logprobs, losses = expected
    results = ranks.run(layout.world_size, rank_jobs_gradients.compare, tiny_models["tied"], layout, budgets, file, logprobs)
    for found in results:
        assert {name: error for name, error in found.items() if not error[1] < LIMIT} == {}
        assert set(found) == set(losses)
        is_filled = layout.pipeline_parallel > 1  # to the fewest micro-batches that keep its stages busy
        assert is_filled or len({count for count, *_ in found.values()}) >= 2, "all budgets split alike"
    whole = {name: sum(found[name][3] for found in results) for name in losses}
    assert whole == pytest.approx(losses, rel=1e-5, abs=1e-7)


def test_on_the_first_update_ratios_are_one(ranks, tiny_models):
    """Whatever the packing in which the old log-probs were computed."""
    (found,) = ranks.run(1, rank_jobs_gradients.on_policy, tiny_models["tied"], Layout())
    assert set(found) == set(registry.names("algorithms"))
    assert {name: bad for name, bad in found.items() if bad[0] > 1e-5 or bad[1] != 0} == {}


def test_the_reference_stays_and_the_policy_comes_back(ranks, tiny_models):
    """Bit for bit."""
    for found in ranks.run(2, rank_jobs_gradients.reference_and_asked, tiny_models["tied"], Layout(pipeline_parallel=2)):
        assert found[0] and found[2]
    assert found[1], "the steps changed nothing"  # the last stage reports the log-probs


def test_a_model_that_is_only_asked_holds_no_gradients(ranks, tiny_models):
    ((frozen, none, whole, some),) = ranks.run(1, rank_jobs_gradients.asked, tiny_models["tied"], Layout())
    assert frozen == whole and none == 0 < some
