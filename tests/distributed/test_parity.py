"""Real ranks over gloo against transformers, and every layout against one rank.

Not covered: bfloat16, GPUs, more than four ranks.
"""

import functools
import math
import re

import numpy as np
import pytest
import rank_jobs
from safetensors.torch import load_file

from megatron_agent.training.layout import Layout

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp2": Layout(2, 1, 1),
    "pp2": Layout(1, 2, 1),
    "dp2": Layout(1, 1, 2),
    "tp2pp2": Layout(2, 2, 1),
    "tp2dp2": Layout(2, 1, 2),
    "tp2sp": Layout(2, sequence_parallel=True),
    "cp2": Layout(context_parallel=2),
    "tp2cp2sp": Layout(2, context_parallel=2, sequence_parallel=True),
    "pp2vpp2": Layout(pipeline_parallel=2, virtual_pipeline=2),
    "pp2cp2": Layout(pipeline_parallel=2, context_parallel=2),
    "tp4": Layout(4),  # more ranks than the two KV heads
    "tp4sp": Layout(4, sequence_parallel=True),
    "pp2uneven": Layout(pipeline_parallel=2, stage_layers=(1, 3)),
}
CASES = [("tied", "one"), *(("tied", name) for name in LAYOUTS), ("untied", "tp2pp2")]


@pytest.fixture(scope="module")
def trained(ranks, tiny_models):
    """(model, layout) -> results of every rank; each pair is trained once."""

    @functools.cache
    def run(model, name):
        layout = LAYOUTS.get(name, Layout())
        return ranks.run(layout.world_size, rank_jobs.train, tiny_models[model], layout)

    return run


def of_steps(results):
    """-> loss per token of every step, gradient norms."""
    losses = [sum(s for s, _, _ in step) / sum(n for _, n, _ in step) for step in zip(*(r["steps"] for r in results))]
    return losses, [step[2] for step in results[0]["steps"]]


def merged_logprobs(results):
    found = {}
    for result in results:
        assert not found.keys() & result["logprobs"].keys(), "two ranks report one row"
        found |= result["logprobs"]
    return [found[i] for i in range(len(found))]


def assert_logprobs(results, expected, tolerance=2e-5):
    found = merged_logprobs(results)
    assert [len(row) for row in found] == [len(row) for row in expected]
    gap = max(np.abs(np.array(a) - np.array(b)).max() for a, b in zip(found, expected))
    assert gap < tolerance


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logprobs_equal_transformers(trained, references, model, layout):
    assert_logprobs(trained(model, layout), references[model].logprobs())


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_first_loss_equals_transformers(trained, references, model, layout):
    losses, _ = of_steps(trained(model, layout))
    assert losses[0] == pytest.approx(references[model].loss, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_adam_steps_equal_one_rank(trained, layout):
    results = trained("tied", layout)
    losses, norms = of_steps(results)
    expected_losses, expected_norms = of_steps(trained("tied", "one"))
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert losses[4] < losses[0] - 0.2  # it learns: else equal losses say little
    assert len({step[2] for result in results for step in result["steps"][:1]}) == 1, "ranks disagree about the norm"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_of_blocks_are_those_of_one_rank(trained, layout):
    """And gradients' make up the whole norm."""
    for (*_, norm), found, expected in zip(
        trained("tied", layout)[0]["steps"], trained("tied", layout)[0]["of_blocks"], trained("tied", "one")[0]["of_blocks"]
    ):
        assert found == pytest.approx(expected, rel=1e-5)
        gradients = [value for name, value in found.items() if name.startswith("grad_norm/")]
        assert math.hypot(*gradients) == pytest.approx(norm, rel=1e-5)


def test_weight_norms_are_those_of_the_folder(trained, tiny_models):
    squares = {}
    for name, values in load_file(tiny_models["tied"] / "model.safetensors").items():
        layer = re.search(r"\blayers\.(\d+)\.", name)  # the tower's are called blocks
        if layer:
            block = f"layer_{int(layer[1]):02d}"
        else:
            parts = {"merger": "merger", "visual": "vision", "embed_tokens": "embedding"}
            block = next((block for part, block in parts.items() if part in name), "head")
        squares[f"weight_norm/{block}"] = squares.get(f"weight_norm/{block}", 0.0) + float(values.double().square().sum())
    (first, *_) = trained("tied", "one")[0]["of_blocks"]
    found = {name: value for name, value in first.items() if name.startswith("weight_norm/")}
    assert found == pytest.approx({name: value**0.5 for name, value in squares.items()}, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_numbers_its_ranks_as_layout_does(trained, layout):
    assert [r["at"] for r in trained("tied", layout)] == [r["ours"] for r in trained("tied", layout)]


def test_temperature_is_that_of_sampling(ranks, tiny_models, references):
    layout = LAYOUTS["tp2"]
    results = ranks.run(2, rank_jobs.train, tiny_models["untied"], layout, 90, 0.7, 0)
    assert_logprobs(results, references["untied"].logprobs(temperature=0.7))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("tied", "one"),
        ("untied", "tp2"),
        ("tied", "pp2"),
        ("tied", "tp2pp2"),
        ("untied", "tp2pp2"),
        ("untied", "tp2sp"),
        ("tied", "tp4"),
        ("tied", "pp2uneven"),
    ],
)
def test_gradients_equal_transformers(ranks, tiny_models, references, model, layout):
    """Of every parameter, vision tower included. Data parallel ranks hold parts of the sum and are left to the steps."""
    layout = LAYOUTS.get(layout, Layout())
    results = ranks.run(
        layout.world_size, rank_jobs.gradient_errors, tiny_models[model], layout, references[model].gradient_file
    )
    errors = {f"rank {rank} {name}": error for rank, (found, _) in enumerate(results) for name, error in found.items()}
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}
    assert all(total == 0 for _, padding in results for total in padding), "the vocabulary's padding has a gradient"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(trained, ranks, tiny_models, recompute):
    layout = LAYOUTS["tp2sp"]
    losses, norms = of_steps(ranks.run(2, rank_jobs.train, tiny_models["tied"], layout, 90, 1.0, 5, recompute))
    expected_losses, expected_norms = of_steps(trained("tied", "one"))
    assert losses == pytest.approx(expected_losses, abs=1e-5) and norms == pytest.approx(expected_norms, rel=1e-5)


def test_splits_into_microbatches_do_not_matter(trained, ranks, tiny_models):
    expected_losses, expected_norms = of_steps(trained("tied", "one"))
    counts = {trained("tied", "one")[0]["num_microbatches"]}
    for budget in (50, 10_000):
        results = ranks.run(1, rank_jobs.train, tiny_models["tied"], Layout(), budget)
        losses, norms = of_steps(results)
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        counts.add(results[0]["num_microbatches"])
    assert len(counts) == 3 and 1 in counts


@pytest.mark.parametrize(
    ("layout", "num_rows", "num_empty"),
    [
        (Layout(data_parallel=2), 3, 1),
        (Layout(data_parallel=2), 1, 1),
        (Layout(tensor_parallel=2, data_parallel=2, sequence_parallel=True), 1, 2),
        (Layout(pipeline_parallel=2, data_parallel=2), 1, 2),
        (Layout(context_parallel=2, data_parallel=2), 1, 2),
    ],
    ids=str,
)
def test_ranks_without_rows_take_part_in_the_step(ranks, tiny_models, references, layout, num_rows, num_empty):
    """Rows that are fewer than the data-parallel ranks, or no multiple of them: the others get rows of padding."""
    results = ranks.run(layout.world_size, rank_jobs.train_on_few_rows, tiny_models["tied"], layout, num_rows)
    assert sum(result["num_empty"] for result in results) == num_empty
    assert_logprobs(results, references["tied"].logprobs()[:num_rows])
    losses, norms = of_steps(results)
    one = ranks.run(1, rank_jobs.train_on_few_rows, tiny_models["tied"], Layout(), num_rows)
    assert one[0]["num_empty"] == 0
    expected_losses, expected_norms = of_steps(one)
    assert losses == pytest.approx(expected_losses, abs=1e-5) and losses[1] < losses[0]
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert len({step[2] for result in results for step in result["steps"][:1]}) == 1, "ranks disagree about the norm"


def test_a_loss_that_is_no_number_stops_every_rank_before_the_step(ranks, tiny_models):
    for error, changed in ranks.run(2, rank_jobs.loss_is_nan, tiny_models["tied"], LAYOUTS["pp2"]):
        assert "the loss is not a number" in error and not changed


def test_the_guard_refuses_what_gloo_would_spoil(ranks):
    assert "non-contiguous tensor (3, 4)" in ranks.run(1, rank_jobs.non_contiguous_broadcast)[0]
