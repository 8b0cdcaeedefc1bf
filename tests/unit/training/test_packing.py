"""Planning of micro-batches, and one packed row drawn token by token.

Not covered: the move to a GPU; decoding of pictures (tests/unit/data).
"""

import random

import numpy as np
import pytest
import torch

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.packing import build_microbatch, plan_microbatches, split_balanced
from megatron_agent.types import ImageRef, TrainSample


def test_split_is_longest_first_to_the_lightest():
    # 7 -> a, 5 -> b, 4 -> b (5 < 7), 3 -> a (7 < 9), 1 -> b (9 < 10)
    assert split_balanced([1, 7, 4, 5, 3], 2) == [[1, 4], [0, 2, 3]]
    assert split_balanced([1, 7, 4, 5, 3], 2, indices=[0, 2, 4]) == [[2], [0, 4]]
    assert split_balanced([2, 2, 2], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("num_data_parallel", [1, 2, 4])
@pytest.mark.parametrize("fewest", [1, 4])
def test_plans_keep_the_budget_and_cover_every_row(num_data_parallel, fewest):
    for seed in range(50):
        rng = random.Random(seed)
        lengths = [rng.randint(5, 60) for _ in range(8 * num_data_parallel)]
        budget = rng.choice([100, 150, 400])
        plan = plan_microbatches(lengths, budget, num_data_parallel, fewest)
        assert len(plan) == num_data_parallel
        assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
        assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) >= fewest
        loads = [sum(lengths[i] for batch in rank for i in batch) for rank in plan]
        assert max(loads) - min(loads) <= max(lengths)
        for rank in plan:
            assert all(sum(lengths[i] for i in batch) <= budget for batch in rank)
            assert [bool(batch) for batch in rank] == sorted((bool(batch) for batch in rank), reverse=True)  # empty ones last
        assert any(all(rank) for rank in plan)  # else one micro-batch fewer would do


def test_no_more_microbatches_than_needed():
    assert plan_microbatches([10, 10, 10, 10], 40, 1) == [[[0, 1, 2, 3]]]
    assert plan_microbatches([10, 10, 10, 10], 20, 1) == [[[0, 2], [1, 3]]]
    assert plan_microbatches([10, 10, 10, 10], 40, 1, min_microbatches=4) == [[[0], [1], [2], [3]]]
    assert plan_microbatches([10, 10, 10, 10], 40, 2, min_microbatches=4) == [[[0], [2]], [[1], [3]]]


@pytest.mark.parametrize(
    ("lengths", "ranks", "plan"),
    [
        ([100] * 5, 2, [[[0], [2], [4]], [[1], [3], []]]),
        ([100, 60, 50, 50, 40], 2, [[[0], [3]], [[1], [2, 4]]]),
        ([10, 10, 10], 2, [[[0, 2]], [[1]]]),
        ([10], 2, [[[0]], [[]]]),
        ([100, 100], 4, [[[0]], [[1]], [[]], [[]]]),
        ([], 2, [[[]], [[]]]),
        ([40, 40, 30, 30, 30, 30], 1, [[[0, 4], [1, 5], [2, 3]]]),  # even parts: first fit alone makes 80, 90, 30
        ([60, 40, 35, 35, 30], 1, [[[0, 1], [2, 3, 4]]]),  # even parts would be 60 35 and 40 35 30
    ],
)
def test_any_number_of_rows_has_a_plan(lengths, ranks, plan):
    assert plan_microbatches(lengths, 100, ranks) == plan


def test_random_rows_always_have_a_plan():
    for seed in range(300):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(0, 12))]
        ranks, fewest = rng.randint(1, 5), rng.choice([1, 4])
        plan = plan_microbatches(lengths, 100, ranks, fewest)
        assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
        assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
        assert all(sum(lengths[i] for i in batch) <= 100 for rank in plan for batch in rank)


def test_a_row_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="a row of 21 tokens exceeds max_tokens_per_microbatch=20"):
        plan_microbatches([10, 21], 20, 1)


@pytest.fixture(scope="module")
def family(tiny_models):
    return Qwen2_5_VL(tiny_models["tied"])


def pixels(ref):
    return np.full((ref.height_px, ref.width_px, 3), int(ref.source), np.uint8)


def two_rows(image_token_id, old=None):
    """A: prompt 11, picture of 2 tokens, own 12 13, observation 14, own 15.    B: prompt 21, own 22 23."""
    i = image_token_id
    a = TrainSample(
        token_ids_T=[11, i, i, 12, 13, 14, 15],
        action_mask_T=[False, False, False, True, True, False, True],
        rollout_logprobs_T=[0.0, 0.0, 0.0, -0.1, -0.2, 0.0, -0.3],
        advantages_T=[0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0],
        images=[ImageRef("7", 56, 28)],
        has_image_before_T=[False] * 6 + [True],
        old_logprobs_T=old and [0.0, 0.0, 0.0, -1.1, -1.2, 0.0, -1.3],
    )
    b = TrainSample(
        token_ids_T=[21, 22, 23],
        action_mask_T=[False, True, True],
        rollout_logprobs_T=[0.0, -0.4, -0.5],
        advantages_T=[0.0, -2.0, -2.0],
        images=[],
        has_image_before_T=[False] * 3,
        old_logprobs_T=[0.0, -1.4, -1.5],
    )
    return [a, b]


def test_a_packed_row(family):
    i = family.image_token_id
    batch = build_microbatch(two_rows(i), [0, 1], family, pixels, pad_to=12)
    #                                  0   1  2   3   4   5   6 | 7   8   9 | padding
    assert batch.token_ids_T.tolist() == [11, i, i, 12, 13, 14, 15, 21, 22, 23, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 7, 10, 12] and batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids_3T.tolist() == [
        [0, 1, 1, 3, 4, 5, 6, 0, 1, 2, 0, 0],
        [0, 1, 1, 3, 4, 5, 6, 0, 1, 2, 0, 0],
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0],
    ]
    # the hidden state of the token before predicts the target: 12 is predicted at 2, the last image token
    assert batch.target_ids_R.tolist() == [12, 13, 15, 22, 23]
    assert batch.target_positions_R.tolist() == [2, 3, 5, 7, 8]
    assert batch.sample_index_R.tolist() == [0, 0, 0, 1, 1]
    assert batch.advantages_R.tolist() == [1, 1, 1, -2, -2]
    torch.testing.assert_close(batch.rollout_logprobs_R, torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]))
    assert batch.after_image_R.tolist() == [False, False, True, False, False] and batch.after_image_R.dtype == torch.bool
    assert batch.old_logprobs_R is None  # A has none
    assert batch.grids_I3.tolist() == [[1, 2, 4]] and batch.patches_NP.shape == (8, 1176)
    np.testing.assert_array_equal(batch.patches_NP.numpy(), family.patches(pixels(ImageRef("7", 56, 28))))
    assert batch.sample_ids == [0, 1] and batch.num_tokens == 12


def test_without_padding_and_in_another_order(family):
    rows = two_rows(family.image_token_id, old=True)
    batch = build_microbatch(rows, [1, 0], family, pixels, pad_to=10)
    assert batch.cu_seqlens.tolist() == [0, 3, 10] and batch.token_ids_T.tolist()[:4] == [21, 22, 23, 11]
    assert batch.target_positions_R.tolist() == [0, 1, 5, 6, 8]
    assert batch.position_ids_3T[0].tolist() == [0, 1, 2, 0, 1, 1, 3, 4, 5, 6]
    torch.testing.assert_close(batch.old_logprobs_R, torch.tensor([-1.4, -1.5, -1.1, -1.2, -1.3]))
    assert batch.sample_ids == [1, 0]


def test_rows_without_pictures(family):
    batch = build_microbatch(two_rows(family.image_token_id), [1], family, pixels)
    assert batch.patches_NP is None and batch.grids_I3 is None
    assert batch.old_logprobs_R.tolist() == pytest.approx([-1.4, -1.5])


@pytest.mark.parametrize(("pad_to", "multiple", "num_tokens"), [(0, 1, 1), (0, 4, 4), (6, 4, 6), (1, 2, 2)])
def test_no_rows_are_a_row_of_padding(family, pad_to, multiple, num_tokens):
    batch = build_microbatch(two_rows(family.image_token_id), [], family, pixels, pad_to, multiple)
    assert batch.token_ids_T.tolist() == [0] * num_tokens and batch.token_ids_T.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0, num_tokens] and batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids_3T.tolist() == [[0] * num_tokens] * 3 and batch.position_ids_3T.dtype == torch.int64
    full = build_microbatch(two_rows(family.image_token_id, old=True), [0, 1], family, pixels)
    for name in ("target_positions_R", "target_ids_R", "sample_index_R", "advantages_R", "rollout_logprobs_R",
                 "old_logprobs_R", "after_image_R"):  # fmt: skip
        assert getattr(batch, name).shape == (0,) and getattr(batch, name).dtype == getattr(full, name).dtype, name
    assert batch.patches_NP is None and batch.grids_I3 is None and batch.sample_ids == []


def test_pictures_stay_in_row_order(family):
    i = family.image_token_id
    refs = [ImageRef("1", 28, 28), ImageRef("2", 28, 56), ImageRef("3", 28, 28)]
    zeros = [0.0] * 5
    a = TrainSample([1, i, 2, i, i], [False, False, True, False, False], zeros, zeros, refs[:2], has_image_before_T=[False] * 5)
    b = TrainSample([1, i, 2], [False, False, True], zeros[:3], zeros[:3], refs[2:], has_image_before_T=[False] * 3)
    batch = build_microbatch([a, b], [0, 1], family, pixels)
    assert batch.grids_I3.tolist() == [[1, 2, 2], [1, 4, 2], [1, 2, 2]]
    whole = np.concatenate([family.patches(pixels(ref)) for ref in refs])
    np.testing.assert_array_equal(batch.patches_NP.numpy(), whole)


def test_a_first_token_cannot_be_a_target(family):
    row = TrainSample([1, 2], [True, False], [0.0, 0.0], [0.0, 0.0], [], has_image_before_T=[False] * 2)
    with pytest.raises(ValueError, match="first token of a row cannot be an action"):
        build_microbatch([row], [0], family, pixels)
