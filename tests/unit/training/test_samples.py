"""Trajectory -> TrainSample drawn token by token. Not covered: how the loop makes trajectories (tests/unit/rollout)."""

import pytest

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.algorithms.grpo import GRPO
from megatron_agent.training.samples import to_sample, to_samples
from megatron_agent.types import ImageRef, LossUse, RewardParts, Task, Trajectory, TrajectoryGroup, Turn, Unscored

PICTURE, CROP = ImageRef("p", 56, 56), ImageRef("p", 28, 28, crop_box_px=(0, 0, 9, 9))
TASK = Task("file:3", "vstar", (), (PICTURE,), "visual_toolbox_v2", "red", "Which?")


def two_turns(reward=RewardParts({"accuracy": 1.0, "format": -1.0}, {"accuracy": 0.8, "format": 0.2})):  # noqa: B008
    """prompt 1 2, turn 3 4, observation 5 P 6 (P: the crop), turn 7 8."""
    first = Turn([3, 4], [-0.3, -0.4], [1, 1], "look", "stop", [5, 99, 6], [CROP], tool_reward=0.05)
    second = Turn([7, 8], [-0.7, -0.8], [1, 2], "red", "stop", tool_reward=0.02)
    return Trajectory(TASK, 0, [1, 2], [first, second], reward=reward)


def test_two_turns_with_a_picture_between():
    sample = to_sample(two_turns())
    own, not_own = True, False
    assert sample.token_ids_T == [1, 2, 3, 4, 5, 99, 6, 7, 8]
    assert sample.action_mask_T == [not_own, not_own, own, own, not_own, not_own, not_own, own, own]
    assert sample.rollout_logprobs_T == [0, 0, -0.3, -0.4, 0, 0, 0, -0.7, -0.8]
    assert sample.has_image_before_T == [False] * 7 + [True] * 2
    assert sample.advantages_T == [0.0] * 9 and sample.old_logprobs_T is None
    assert sample.images == [PICTURE, CROP] and sample.group_id == "file:3"
    assert abs(sample.reward - (0.8 - 0.2 + 0.07)) < 1e-12  # outcome and process reward
    assert sample.num_action_tokens == 4 and sample.token_ids_T == two_turns().token_ids


def test_a_text_observation_is_no_picture():
    trajectory = two_turns()
    trajectory.turns[0].observation_images = []
    assert to_sample(trajectory).has_image_before_T == [False] * 9


def test_the_last_observation_is_no_target():
    trajectory = two_turns()
    trajectory.turns = trajectory.turns[:1]
    assert to_sample(trajectory).action_mask_T == [False, False, True, True, False, False, False]


class Position(Algorithm):
    """Advantages that tell the rows apart."""

    def advantages(self, samples):
        return [[float(index)] * sample.num_tokens for index, sample in enumerate(samples)]

    def loss(self, inputs):
        raise NotImplementedError


def test_a_masked_trajectory_counts_in_its_group_and_a_dropped_one_does_not():
    good = two_turns()
    masked, dropped, bad = (two_turns(RewardParts({"accuracy": 0.0}, {"accuracy": 1.0})) for _ in range(3))
    masked.loss_use, dropped.loss_use = LossUse.MASK, LossUse.DROP
    assert to_sample(masked).num_action_tokens == 0
    (sample,) = to_samples([TrajectoryGroup(TASK, [good, masked, dropped])], GRPO(GRPO.Config()))
    (same, _) = to_samples([TrajectoryGroup(TASK, [good, bad])], GRPO(GRPO.Config()))
    assert sample.advantages_T == same.advantages_T and sample.advantages_T[2] > 0


def test_unscored_trajectories_are_left_out_and_empty_ones_are_no_rows():
    empty = Trajectory(TASK, 0, [1, 2], [], reward=RewardParts({}, {}))
    unscored, unfinished = two_turns(Unscored("judge is down")), two_turns(None)
    groups = [TrajectoryGroup(TASK, [unscored, two_turns(), empty]), TrajectoryGroup(TASK, [two_turns(), unfinished])]
    samples = to_samples(groups, Position())
    assert [sample.group_id for sample in samples] == ["0/file:3", "1/file:3"]  # one task drawn twice: two groups
    assert [sample.advantages_T[0] for sample in samples] == [0.0, 2.0]  # the empty one had its place
    assert to_samples([TrajectoryGroup(TASK, [unscored])], Position()) == []


def test_a_trajectory_without_tokens_counts_in_the_baseline():
    wrong = RewardParts({"accuracy": 0.0}, {"accuracy": 1.0})
    cut = Trajectory(TASK, 0, [1, 2], [Turn([], [], [], "", "placeholder")], reward=wrong)
    right = two_turns(RewardParts({"accuracy": 1.0}, {"accuracy": 0.93}))  # and 0.07 from its tools
    (sample,) = to_samples([TrajectoryGroup(TASK, [cut, right])], GRPO(GRPO.Config(normalise_std=False)))
    assert sample.advantages_T[2] == pytest.approx(0.5)


def test_process_rewards_and_lags_of_tokens():
    sample = to_sample(two_turns(), weight_version=3)
    assert sample.process_rewards_T == [0, 0, 0, 0.05, 0, 0, 0, 0, 0.02]  # the last token of each turn
    assert sample.lag_T == [0, 0, 2, 2, 0, 0, 0, 2, 1]
    assert to_sample(two_turns()).lag_T == [0] * 9
