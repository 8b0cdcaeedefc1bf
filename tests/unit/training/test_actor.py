"""The driver's side that needs no rank: mini-batches, options, learning rates, order of supervised rows.

Not covered: the Ray calls (tests/integration).
"""

import asyncio

import pytest

from megatron_agent.config import SftSection
from megatron_agent.errors import ConfigError
from megatron_agent.sft import lr_at, row_order
from megatron_agent.training.actor import Actor, TrainingConfig, minibatches
from megatron_agent.training.layout import Layout
from megatron_agent.training.loss import Supervised
from megatron_agent.types import TrainSample


def rows(*group_ids):
    return [TrainSample([i], [True], [0.0], [0.0], [], group_id=group) for i, group in enumerate(group_ids)]


@pytest.mark.parametrize(
    ("groups", "count", "expected"),
    [
        ("aabbcc", 1, ["aabbcc"]),
        ("aabbcc", 3, ["aa", "bb", "cc"]),
        ("aaabcc", 2, ["aaab", "cc"]),
        ("abcde", 2, ["ab", "cde"]),
        ("aab", 4, ["aa", "b"]),  # fewer groups than parts: no empty part
    ],
)
def test_minibatches_keep_groups_whole_and_in_order(groups, count, expected):
    parts = minibatches(rows(*groups), count)
    assert ["".join(row.group_id for row in part) for part in parts] == expected
    assert [row.token_ids_T[0] for part in parts for row in part] == list(range(len(groups)))


def test_an_update_on_no_rows_changes_nothing():
    """A step of which nothing could be scored; the ranks are not even asked."""
    assert asyncio.run(Actor([], TrainingConfig()).update([], Supervised(), 1e-3)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "training.tensor_parallel=0"),
        ({"num_steps": -1}, "training.num_steps=-1 must be 0 or more"),
        ({"prompts_per_step": 0}, "training.prompts_per_step=0 must be 1 or more"),
        ({"minibatches_per_step": 0}, "training.minibatches_per_step=0"),
        ({"max_tokens_per_microbatch": 0}, "training.max_tokens_per_microbatch=0"),
        ({"num_cpu_threads": 0}, "training.num_cpu_threads=0"),
        ({"dtype": "float16"}, "training.dtype='float16'; allowed: float32, bfloat16"),
        ({"betas": [0.9]}, "training.betas"),
        ({"betas": [0.9, 1.0]}, "training.betas"),
        ({"lr": 0.0}, r"training.lr=0.0 must be above 0"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


def test_layout_of_the_options():
    layout = TrainingConfig(tensor_parallel=2, pipeline_parallel=3, data_parallel=4).layout
    assert layout == Layout(2, 3, 4) and layout.world_size == 24


def test_warm_up_then_constant():
    config = TrainingConfig(lr=1e-3, warmup_steps=4)
    assert [config.lr_at(step) for step in (1, 2, 4, 5, 100)] == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    assert TrainingConfig(lr=1e-3).lr_at(1) == 1e-3


def test_rates_that_fall():
    options = dict(lr=1.0, warmup_steps=2, num_steps=10, min_lr_fraction=0.2)
    linear = TrainingConfig(lr_schedule="linear", **options)
    cosine = TrainingConfig(lr_schedule="cosine", **options)
    assert [linear.lr_at(step) for step in (1, 2, 6, 10, 11)] == pytest.approx([0.5, 1, 0.6, 0.2, 0.2])
    assert [cosine.lr_at(step) for step in (1, 2, 4, 6, 10)] == pytest.approx([0.5, 1, 0.2 + 0.8 * 0.8535534, 0.6, 0.2])


def test_supervised_rate_rises_stays_and_falls():
    config = SftSection(num_steps=10, lr=1.0, warmup_steps=2, decay_fraction=0.4, min_lr_fraction=0.3)
    found = [lr_at(config, step) for step in range(1, 11)]
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.3])
    flat = SftSection(num_steps=3, lr=2.0, warmup_steps=0, decay_fraction=0.0)
    assert [lr_at(flat, step) for step in (1, 2, 3)] == [2.0, 2.0, 2.0]


def test_row_order_passes_over_all_rows():
    order = row_order(num_rows=6, num_steps=5, rows_per_step=4, seed=3)
    assert [len(step) for step in order] == [4] * 5
    flat = [row for step in order for row in step]
    assert sorted(flat[:6]) == sorted(flat[6:12]) == sorted(flat[12:18]) == list(range(6))
    assert flat[:6] != flat[6:12]
    assert order == row_order(6, 5, 4, 3) and order != row_order(6, 5, 4, 4)
