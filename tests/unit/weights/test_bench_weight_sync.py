"""What tools/bench_weight_sync.py and the load of tools/check_sync.py reckon with, without the processes that they start.

Not covered: the figures (run the bench), the trainer's word on every token (tests/integration/test_sync_under_load.py).
"""

import sys
from pathlib import Path

import pytest
import torch

from megatron_agent.rollout.generation import Generation
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.layout import Layout

sys.path.append(str(Path(__file__).parents[3] / "tools"))
from _sync_load import Turn, growth, wrong_stamps
from bench_weight_sync import region_of


def turn(stamps, first, last):
    count = len(stamps)
    return Turn([7, 8], [], Generation(list(range(count)), [-0.5] * count, stamps, "length"), first, last)


UNDER_WAY = turn([3, 3, 4, 4], 3, 4)


@pytest.mark.parametrize("stamps, first, last", [([4, 3], 3, 4), ([2, 3], 3, 3), ([3, 4], 3, 3)])
def test_stamps_that_cannot_be(stamps, first, last):
    """Back in time, older than what was served when the request was made, newer than any round begun before the answer."""
    assert wrong_stamps([UNDER_WAY]) == []
    (said,) = wrong_stamps([UNDER_WAY, turn(stamps, first, last)])
    assert str(stamps) in said and f"{first} and {last}" in said


def test_a_load_that_no_sync_met_says_nothing():
    assert "this was no load" in wrong_stamps([turn([3, 3], 3, 3)])[0]


def test_tokens_of_one_version_are_the_actions():
    sample = UNDER_WAY.stamped(3)
    assert sample.token_ids_T == [7, 8, 0, 1, 2, 3]
    assert sample.action_mask_T == [False, False, True, True, False, False]
    assert sample.rollout_logprobs_T == [0.0, 0.0, -0.5, -0.5, 0.0, 0.0]
    assert UNDER_WAY.stamped(5) is None


def test_growth_is_of_the_last_quarter_over_the_second():
    assert growth({"rank": [0, 50, 100, 100, 100, 500, 107, 107]}) == {"rank": 7}


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_a_region_holds_every_tensor_once(tiny_models, which, tmp_path):
    family = read_family(tiny_models[which])
    region = region_of(family, Layout(2), "bfloat16", tmp_path / "region")
    memory = region.open()
    for number, view in enumerate(region.views(memory).values(), 1):
        view.fill_(number)
    from safetensors import safe_open

    with safe_open(tiny_models[which] / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    assert {name: shape for name, shape, _ in region.tensors} == shapes
    for number, view in enumerate(region.views(memory).values(), 1):
        assert torch.equal(view, torch.full_like(view, number))
    assert not memory[:64].any()
