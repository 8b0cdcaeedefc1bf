"""Overlap of words, the protocol of the search tools, and the reward's numbers."""

import asyncio

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.rag import RagReward, f1, truths, words
from megatron_agent.types import Status, Task, ToolCall, Trajectory, Turn, Unscored

TASK = Task("t", "rag_v2-train", (), (), "rag_v2", "Barack Obama", "Who?")
SEARCH = "<think>I need the year.<|begin_of_query|>president 2010<|end_of_query|>"
FOUND = "It was Obama.</think><answer>Barack Obama</answer>"


@pytest.mark.parametrize(("text", "found"), [
    ("The U.S. of A.", ["u", "s", "of"]), ("the", ["the"]), ("", []), ("True", ["yes"]), (" false ", ["no"]),
    ("It is true", ["it", "is", "true"]), ("snake_case, 3.5", ["snake", "case", "3", "5"]), ("Łódź", ["łódź"]),
])  # fmt: skip
def test_words(text, found):
    assert words(text) == found


@pytest.mark.parametrize(("answer", "truth", "value"), [
    ("Barack Obama", "Barack Obama", 1.0),
    ("the barack obama!", "Barack Obama", 1.0),
    ("Obama", "Barack Obama", 2 / 3),
    ("Barack Hussein Obama", "Barack Obama", 4 / 5),
    ("Obama Obama", "Barack Obama", 1 / 2),  # a word counts as often as it is in both
    ("Obama Barack", "Barack Obama", 1.0),
    ("George Bush", "Barack Obama", 0.0),
    ("yes it is", "yes", 0.0), ("no", "no it is not", 0.0), ("True", "yes", 1.0), ("yes", "no", 0.0),
    ("...", "Obama", 0.0), ("...", "...", 0.0),
])  # fmt: skip
def test_f1(answer, truth, value):
    assert f1(answer, truth) == pytest.approx(value)


def episode(*texts, ok=True, status=Status.ANSWERED):
    """Every turn but the last searches."""
    turns = [Turn([1], [0.0], [0], text, "stop", tool_calls=[ToolCall("search", ok)]) for text in texts[:-1]]
    turns += [Turn([1], [0.0], [0], text, "stop") for text in texts[-1:]]
    return Trajectory(TASK, 0, [1], turns, status)


def parts(trajectory, task=TASK, **options):
    found = asyncio.run(RagReward(RagReward.Config(**options)).score(trajectory, task))
    return (found.parts["accuracy"], found.parts["format"], found.parts["retrieval"]), found.total


@pytest.mark.parametrize(("trajectory", "expected", "total"), [
    (episode(SEARCH, FOUND), (1, 0, 1), 1.0),  # documents come in the middle of a thought
    (episode("<think>I know.</think><answer>Obama</answer>"), (2 / 3, 0, 0), 2 / 3),
    (episode(SEARCH, FOUND, ok=False), (1, 0, 0), 1.0),
    (episode("<think>a</think><search>who</search>", "<think>b</think><answer>Barack Obama</answer>"), (1, 0, 1), 1.0),
    (episode(SEARCH, "It was Obama.<answer>Barack Obama</answer>"), (1, -1, 1), -1.0),  # the thought is open
    (episode(SEARCH + "<|begin_of_documents|>(1)Obama<|end_of_documents|>", FOUND), (1, -1, 1), -1.0),
    (episode("<information>Obama</information><think>a</think><answer>Barack Obama</answer>"), (1, -1, 0), -1.0),
    (episode("<think>a<|begin_of_query|>x</think><answer>Barack Obama</answer>"), (1, -1, 0), -1.0),
    (episode("<think>a</think><answer>x</answer><answer>Barack Obama</answer>"), (1, -1, 0), -1.0),
    (episode("<think><answer>Barack Obama</answer></think>"), (1, -1, 0), -1.0),
    (episode("<think>a</think><answer>" + "Obama " * 11 + "</answer>"), (2 / 13, -1, 0), 2 / 13 - 2),
    (episode("<think>a</think>Barack Obama"), (0, -1, 0), -2.0),
    (episode("<think>a</think><answer></answer>"), (0, -1, 0), -2.0),
    (episode("<think>a</think><answer>Barack Obama</answer>", status=Status.LENGTH), (1, -1, 0), -1.0),
    (episode("<|im_start|><think>a</think><answer>Barack Obama</answer>"), (1, -1, 0), -1.0),
    (episode(status=Status.CONTEXT_FULL), (0, -1, 0), -2.0),
])  # fmt: skip
def test_the_numbers(trajectory, expected, total):
    found, found_total = parts(trajectory)
    assert found == pytest.approx(expected) and found_total == pytest.approx(total)


def test_options():
    almost = episode(SEARCH, FOUND.replace("Barack", "President"))
    assert parts(almost)[0] == (0.5, 0.0, 1.0)
    assert parts(almost, metric="em")[0] == (0.0, 0.0, 1.0)
    assert parts(episode(SEARCH, FOUND), metric="em")[0] == (1.0, 0.0, 1.0)
    first_stage = dict(accuracy_weight=0.0, format_weight=0.5, retrieval_weight=0.5)
    assert parts(almost, **first_stage)[1] == 0.5
    assert parts(almost, max_answer_words=1)[0] == (0.5, -1.0, 1.0)
    for options, message in (({"metric": "bleu"}, "'bleu'; allowed: f1, em"), ({"max_answer_words": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            RagReward.Config(**options)


def test_several_right_answers():
    task = Task("t", "rag", (), (), "rag", "Barack Obama", "Who?", {"answers": ["President Obama", 44]})
    assert truths(task) == ["Barack Obama", "President Obama", "44"]
    assert parts(episode(SEARCH, FOUND.replace("Barack", "President")), task)[0] == (1.0, 0.0, 1.0)
    assert truths(Task("t", "rag", (), (), "rag", "x", "Who?", {"answers": None})) == ["x"]


def test_an_aborted_episode():
    assert isinstance(asyncio.run(RagReward().score(episode(SEARCH, status=Status.ABORTED), TASK)), Unscored)
