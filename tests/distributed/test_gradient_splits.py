"""One batch, split over data and context ranks, micro-batches and packed rows: the gradient of every parameter is the same.

Token-mean and sequence-mean losses, against rows that are taken one at a time on one rank. Not covered: tensor and pipeline
ranks (test_parity.py), bfloat16.
"""

import pytest
import rank_jobs_gradients

from megatron_agent.training.layout import Layout

pytestmark = pytest.mark.distributed

LIMIT = 1e-5  # of the largest entry of a parameter's gradient
LAYOUTS = {
    "one": Layout(),
    "dp2": Layout(data_parallel=2),
    "cp2": Layout(context_parallel=2),
    "dp2cp2": Layout(data_parallel=2, context_parallel=2),
    "dp3": Layout(data_parallel=3),
}
BUDGETS = (52, 90, 10_000)  # tokens of a micro-batch: a row or two, some, all


@pytest.fixture(scope="module")
def expected(ranks, tiny_models, tmp_path_factory):
    file = tmp_path_factory.mktemp("gradients") / "expected.safetensors"
    ranks.run(1, rank_jobs_gradients.write_expected, tiny_models["tied"], file)
    return file


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_same_for_every_split(ranks, tiny_models, expected, layout):
    layout = LAYOUTS[layout]
    results = ranks.run(layout.world_size, rank_jobs_gradients.compare, tiny_models["tied"], layout, BUDGETS, expected)
    for found in results:
        assert {case: error for case, error in found.items() if not error[1] < LIMIT} == {}
        assert len(found) == 9 and len({count for count, _, _ in found.values()}) >= 2, "all budgets split alike"
