"""The reward of games: the sum of what the environment paid, and whether its last word was that the game is solved."""

import asyncio

import pytest

from megatron_agent.rewards.env_return import EnvReturnReward
from megatron_agent.types import Status, Task, Trajectory, Turn, Unscored

TASK = Task("t:0", "frozenlake", (), (), "frozenlake", "1", "?")


def score(rewards, status=Status.ANSWERED, **options):
    turns = [Turn([1], [0.0], [0], "<action>up</action>", "stop", tool_reward=paid) for paid in rewards]
    reward = EnvReturnReward(EnvReturnReward.Config(**options))
    return asyncio.run(reward.score(Trajectory(TASK, 0, [1], turns, status), TASK))


@pytest.mark.parametrize(
    ("rewards", "env_return", "accuracy"),
    [
        ([0.0, 0.0, 1.0], 1.0, 1.0),
        ([-0.1, 0.9, -0.1], 0.7, 0.0),
        ([-0.1, 10.9], 10.8, 1.0),
        ([1.0, 0.5], 1.5, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_parts(rewards, env_return, accuracy):
    found = score(rewards)
    assert found.parts == {"env_return": pytest.approx(env_return), "accuracy": accuracy}
    assert found.total == pytest.approx(env_return)


def test_weights_and_what_counts_as_solved():
    assert score([2.0, 1.0], env_return_weight=0.5, accuracy_weight=4.0).total == 5.5
    assert score([2.0, 1.0], solved_above=1.0).parts["accuracy"] == 0.0


def test_unfinished_episodes_are_scored_and_aborted_ones_are_not():
    assert score([0.0, -0.1], status=Status.MAX_TURNS).total == pytest.approx(-0.1)
    assert isinstance(score([1.0], status=Status.ABORTED), Unscored)
