"""The dataclasses between stages, and that errors cross a process boundary. Those that only hold fields have no test."""

import pickle
from dataclasses import replace

import pytest
import torch

from megatron_agent import errors
from megatron_agent.types import (
    ImageRef,
    LossInputs,
    RewardParts,
    ShardCopy,
    Status,
    Task,
    ToolCall,
    TrainSample,
    Trajectory,
    Turn,
)

REF = ImageRef("abc", 56, 28, (1, 2, 30, 40), 90)


def test_the_key_of_a_picture_is_pinned():
    """It names files of a run and vLLM's cache entries: a change makes old runs unreadable."""
    assert REF.key == "f006d03e0754c2a895284be3ff3e781e" and len(REF.key) == 32
    assert REF.key == ImageRef("abc", 56, 28, (1, 2, 30, 40), 90).key


@pytest.mark.parametrize(
    "change", [{"source": "abd"}, {"width_px": 28}, {"height_px": 56}, {"crop_box_px": None}, {"crop_box_px": (1, 2, 30, 41)},
               {"rotation_deg": 0}]
)  # fmt: skip
def test_another_recipe_has_another_key(change):
    assert replace(REF, **change).key != REF.key


def test_a_trajectory_is_its_row():
    task = Task("t", "s", (), (REF,), "", "", "")
    crop = replace(REF, rotation_deg=0)
    first = Turn([3], [-0.1], [1], "a", "stop", [4, 5], [crop], tool_calls=[ToolCall("zoom", True)], tool_reward=0.5)
    second = Turn([6, 7], [-0.1, -0.2], [1, 2], "b", "stop", tool_reward=-0.2)
    trajectory = Trajectory(task, 0, [1, 2], [first, second])
    assert trajectory.token_ids == [1, 2, 3, 4, 5, 6, 7] and trajectory.prompt_token_ids == [1, 2]
    assert trajectory.images == [REF, crop] and trajectory.num_response_tokens == 3
    assert trajectory.tool_calls == [ToolCall("zoom", True)] and trajectory.text == "ab"
    assert trajectory.process_reward == pytest.approx(0.3)
    assert trajectory.status is Status.ABORTED  # until the loop says otherwise


def test_reward_parts():
    parts = RewardParts({"accuracy": 1.0, "format": -0.5}, {"accuracy": 0.8, "format": 0.2})
    assert parts.total == pytest.approx(0.7) and RewardParts({}, {}).total == 0
    with pytest.raises(ValueError, match=r"parts \['a'\] and weights \['b'\]"):
        RewardParts({"a": 1.0}, {"b": 1.0})


def test_rows_of_a_sample_have_one_length():
    with pytest.raises(ValueError, match=r"differ in length: \[1, 2\]"):
        TrainSample([1, 2], [False, True], [0.0], [0.0, 0.0], [])
    sample = TrainSample([1, 2], [False, True], [0.0, -1.0], [0.0, 0.0], [])
    assert (sample.num_tokens, sample.num_action_tokens) == (2, 1)
    other = sample.with_advantages([0.0, 3.0])
    assert other.advantages_T == [0.0, 3.0] and sample.advantages_T == [0.0, 0.0]
    with pytest.raises(ValueError, match="differ in length"):
        sample.with_advantages([1.0])


def test_sum_over_sequence():
    zeros = torch.zeros(5)
    inputs = LossInputs(zeros, zeros, zeros, zeros, torch.tensor([0, 0, 2, 2, 2]), num_samples=4)
    values = torch.arange(1.0, 6.0, requires_grad=True)
    sums = inputs.sum_over_sequence(values)
    assert sums.tolist() == [3, 0, 12, 0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad.tolist() == [1, 1, 100, 100, 100]


def test_shape_of_a_copy():
    assert ShardCopy(0, "a", ((2, 5), (0, 7)), 1, "b", ((0, 3), (1, 8))).shape == (3, 7)


@pytest.mark.parametrize(
    "name", [n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.MegatronAgentError)]
)
def test_errors_are_ours_and_pickle(name):
    error = getattr(errors, name)("what; what is allowed")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == "what; what is allowed"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(errors.ConfigError, ValueError), (errors.DataError, ValueError), (errors.EngineError, RuntimeError),
     (errors.TrainingError, RuntimeError)],
)  # fmt: skip
def test_the_users_mistakes_are_value_errors(error, builtin):
    assert issubclass(error, builtin) and issubclass(error, errors.MegatronAgentError)
