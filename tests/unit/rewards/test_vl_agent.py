"""DeepEyes' reward, number by number, and each rule of the format."""

import asyncio

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.base import has_format_error
from megatron_agent.rewards.exact_match import ExactMatchReward
from megatron_agent.rewards.vl_agent import VlAgentReward
from megatron_agent.types import Status, Task, ToolCall, Trajectory, Turn, Unscored

TASK = Task("t:0", "vstar", (), (), "visual_toolbox_v2", "red", "Which colour?")
LOOK = '<think>closer</think>\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {}}\n</tool_call>'
ANSWER = "<think>seen</think><answer>red</answer>"


def episode(*texts, status=Status.ANSWERED, ok=True):
    """All turns but the last call a tool."""
    turns = [Turn([1], [0.0], [0], text, "stop") for text in texts]
    for turn in turns[:-1]:
        turn.tool_calls = [ToolCall("image_zoom_in_tool", ok)]
    return Trajectory(TASK, 0, [1], turns, status)


def score(trajectory, reward=None):
    return asyncio.run((reward or VlAgentReward()).score(trajectory, TASK))


def parts(trajectory, reward=None):
    found = score(trajectory, reward).parts
    return found["accuracy"], found["format"], found["tool"]


@pytest.mark.parametrize(("trajectory", "expected", "total"), [
    (episode(ANSWER), (1, 0, 0), 0.8),
    (episode(LOOK, ANSWER), (1, 0, 1), 2.0),
    (episode(LOOK, LOOK, ANSWER), (1, 0, 1), 2.0),
    (episode(LOOK, ANSWER, ok=False), (1, 0, 0), 0.8),
    (episode(LOOK, ANSWER.replace("red", "blue")), (0, 0, 0), 0.0),
    (episode(ANSWER.replace("red", "blue")), (0, 0, 0), 0.0),
    (episode("red"), (0, -1, 0), -0.2),
    (episode("<answer>red</answer></think>"), (1, -1, 0), 0.6),
    (episode(LOOK, "<answer>red</answer></think>"), (1, -1, 1), 1.8),
    (episode(LOOK, LOOK, status=Status.MAX_TURNS), (0, -1, 0), -0.2),
    (episode(LOOK, ANSWER, status=Status.CONTEXT_FULL), (1, -1, 1), 1.8),
    (episode(ANSWER, status=Status.LENGTH), (1, -1, 0), 0.6),
    (episode("<think>loop", status=Status.LENGTH), (0, -1, 0), -0.2),
    (episode("<|image_pad|>", status=Status.EMITTED_PLACEHOLDER), (0, -1, 0), -0.2),
    (episode(status=Status.CONTEXT_FULL), (0, -1, 0), -0.2),
])  # fmt: skip
def test_parts_and_totals(trajectory, expected, total):
    assert parts(trajectory) == expected
    assert score(trajectory).total == pytest.approx(total)


@pytest.mark.parametrize(("length", "expected"), [(999, (1, 0, 0)), (1000, (0, -1, 0)), (5000, (0, -1, 0))])
def test_long_answers_are_not_judged(length, expected):
    class Generous:
        async def verdict(self, question, answer, prediction):
            assert (question, answer, len(prediction)) == ("Which colour?", "red", 999)
            return 1.0

    text = f"<think></think><answer>{'x' * length}</answer>"
    assert parts(episode(text), VlAgentReward(judge=Generous())) == expected


@pytest.mark.parametrize(("texts", "is_error"), [
    ((ANSWER,), False),
    ((ANSWER + "<|im_end|>",), False),
    (("<answer>red</answer>",), False),
    ((LOOK + "<|im_end|>\n", ANSWER), False),
    (("</think><think><answer>red</answer>",), True),
    (("<think><think>a</think></think><answer>red</answer>",), True),
    (("<think>a<answer>red</answer></think>",), True),
    (("<answer>red</answer><answer>red</answer>",), True),
    (("</answer>red<answer>",), True),
    (("<|image_pad|>" + ANSWER,), True),
    ((ANSWER + "<|im_start|>user",), True),
    ((LOOK.replace("closer", "closer<|im_start|>user"), ANSWER), True),
    ((LOOK, "<think>seen</think><|im_start|><answer>red</answer>"), True),
    (("<|vision_start|>" + LOOK, ANSWER), True),
    ((LOOK.replace("<think>closer</think>", ""), ANSWER), True),
    (("well " + LOOK, ANSWER), True),
    ((LOOK + " and so on", ANSWER), True),
    (("<think>a</think>", ANSWER), True),
])  # fmt: skip
def test_format(texts, is_error):
    assert has_format_error(episode(*texts)) is is_error


def test_unscored():
    class Down:
        async def verdict(self, question, answer, prediction):
            return Unscored("the judge is down")

    class Mad:
        async def verdict(self, question, answer, prediction):
            return 7.0

    assert score(episode(ANSWER), VlAgentReward(judge=Down())) == Unscored("the judge is down")
    assert "7.0" in score(episode(ANSWER), VlAgentReward(judge=Mad())).reason
    assert score(episode("no answer"), VlAgentReward(judge=Down())).total == pytest.approx(-0.2)
    assert score(episode(ANSWER, status=Status.ABORTED)) == Unscored("the episode was aborted")


def test_half_right_earns_no_bonus():
    class Half:
        async def verdict(self, question, answer, prediction):
            return 0.5

    assert parts(episode(LOOK, ANSWER), VlAgentReward(judge=Half())) == (0.5, 0, 0)


def test_weights_come_from_the_config():
    reward = VlAgentReward(VlAgentReward.Config(accuracy_weight=1.0, format_weight=0.5, tool_weight=0.25, max_answer_chars=3))
    assert score(episode(LOOK, "<answer>no</answer>"), reward).total == 0.0
    assert score(episode(LOOK, ANSWER), reward).total == -0.5
    with pytest.raises(ConfigError, match="max_answer_chars is 0"):
        VlAgentReward.Config(max_answer_chars=0)


def test_exact_match_reward():
    reward = ExactMatchReward()
    assert score(episode(LOOK, ANSWER), reward).parts == {"accuracy": 1.0}
    assert [score(episode(text), reward).total for text in ("<answer>The Red.</answer>", "red", "<answer>blue</answer>")] == [
        1,
        0,
        0,
    ]
    assert score(episode(), reward).total == 0.0
    assert isinstance(score(episode(ANSWER, status=Status.ABORTED), reward), Unscored)
