"""Every file of rewards/: a score is finite and repeatable whatever the model wrote, and the trajectory is left as it was."""

import asyncio
import copy
import dataclasses
import inspect
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_agent import registry
from megatron_agent.rewards.base import RewardBase
from megatron_agent.types import RewardParts, Status, Task, ToolCall, Trajectory, Turn, Unscored

REWARDS = registry.names("rewards")
TASK = Task("t:0", "vstar", (), (), "visual_toolbox_v2", "red", "Which colour?", {"target_bbox": [0, 0, 10, 20]})
# A final answer in every form that a reward reads: right, and wrong in a way that cannot be mistaken for it.
ANSWERS = [
    ("<answer>red</answer>", "<answer>blue</answer>"),
    (r"\boxed{red}", r"\boxed{blue}"),
    ("<answer>[0, 0, 10, 20]</answer>", "<answer>[30, 30, 40, 50]</answer>"),
]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<|image_pad|>"]
pieces = st.sampled_from([*TAGS, "red", "[0, 0, 9, 9]", r"\boxed{red}", "<search>", "</search>"])
texts = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)


def score(reward, trajectory):
    return asyncio.run(reward.score(trajectory, trajectory.task))


def episode(*texts, status=Status.ANSWERED, env_reward=0.0):
    turns = [Turn([1], [0.0], [0], text, "stop", tool_calls=[ToolCall("zoom", True)]) for text in texts]
    turns[-1:] = [replace(turn, tool_reward=env_reward) for turn in turns[-1:]]
    return Trajectory(TASK, 0, [1], turns, status)


@pytest.mark.parametrize("name", REWARDS)
def test_shape(name):
    component = registry.resolve("rewards", name)
    assert issubclass(component, RewardBase) and dataclasses.is_dataclass(component.Config)
    assert inspect.iscoroutinefunction(component.score)
    config = component.Config()
    assert component(config).config is config and component().config == config


@pytest.mark.parametrize("name", REWARDS)
@settings(max_examples=100, deadline=None, database=None)
@given(texts=st.lists(texts, max_size=3), status=st.sampled_from(Status))
def test_any_trajectory(name, texts, status):
    reward, trajectory = registry.resolve("rewards", name)(), episode(*texts, status=status)
    before = copy.deepcopy(trajectory)
    found = score(reward, trajectory)
    assert isinstance(found, (RewardParts, Unscored)) and trajectory == before
    if isinstance(found, RewardParts):
        assert found.parts and math.isfinite(found.total)
    else:
        assert found.reason
    assert score(reward, trajectory) == found


@pytest.mark.parametrize("name", REWARDS)
def test_right_is_worth_more_than_wrong_and_wrong_no_less_than_nothing(name):
    """What is right the text says, or the environment by its own reward."""
    reward = registry.resolve("rewards", name)()
    nothing = score(reward, episode("<think>a</think>", env_reward=0.0)).total
    totals = [
        [score(reward, episode(f"<think>a</think>{text}", env_reward=paid)).total for text, paid in zip(pair, (1.0, 0.0))]
        for pair in ANSWERS
    ]
    assert all(right >= wrong >= nothing for right, wrong in totals)
    assert any(right > wrong for right, wrong in totals)


@pytest.mark.parametrize("name", REWARDS)
def test_an_aborted_episode_is_never_scored(name):
    trajectory = episode("<think>a</think><answer>red</answer>", status=Status.ABORTED)
    assert isinstance(score(registry.resolve("rewards", name)(), trajectory), Unscored)


@pytest.mark.parametrize("name", REWARDS)
def test_start_and_close(name):
    async def life():
        reward = registry.resolve("rewards", name)()
        await reward.start()
        scored = await reward.score(episode(f"<think>a</think>{ANSWERS[0][0]}"), TASK)
        await reward.close()
        return scored

    assert isinstance(asyncio.run(life()), RewardParts)


@pytest.mark.parametrize("name", REWARDS)
def test_many_at_once(name):
    reward = registry.resolve("rewards", name)()
    trajectories = [episode(f"<think>a</think><answer>{answer}</answer>") for answer in ("red", "blue", "red", "green")]

    async def all_at_once():
        return await asyncio.gather(*(reward.score(trajectory, TASK) for trajectory in trajectories))

    assert asyncio.run(all_at_once()) == [score(reward, trajectory) for trajectory in trajectories]
