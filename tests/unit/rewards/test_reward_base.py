"""Finding the answer, comparing boxes, comparing texts."""

import asyncio

import pytest

from megatron_agent.rewards.base import answer_of, iou
from megatron_agent.rewards.judge import ExactMatchJudge, normalised


@pytest.mark.parametrize(("text", "answer"), [
    ("<think>a</think><answer> red </answer>", "red"),
    ("<answer>red</answer><answer>blue</answer>", "blue"),
    ("<answer> </answer>", None),
    ("<answer>red", None),
    ("", None),
])  # fmt: skip
def test_answer_of(text, answer):
    assert answer_of(text) == answer


@pytest.mark.parametrize(("box", "value"), [
    ((0, 0, 10, 10), 1.0), ((5, 0, 15, 10), 1 / 3), ((0, 0, 5, 10), 0.5), ((10, 0, 20, 10), 0.0), ((3, 3, 3, 9), 0.0),
    ((20, 20, 10, 10), 0.0),
])  # fmt: skip
def test_iou(box, value):
    assert iou((0, 0, 10, 10), box) == pytest.approx(value) and iou(box, (0, 0, 10, 10)) == pytest.approx(value)


@pytest.mark.parametrize(("truth", "prediction", "verdict"), [
    ("Red", " red. ", 1.0),
    ("The red cat", "a  RED cat!", 1.0),
    ("A", "(A)", 1.0),
    ("A", "B", 0.0),
    ("the", "a", 0.0),
    ("1,000", "1000", 1.0),
    ("3.5", "35", 0.0),
    ("-3.5", "3.5", 0.0),
    ("x+1", "x-1", 0.0),
    ("red, blue", "red,blue", 1.0),
    ("+", "-", 0.0),
    ("ＡＢ１", "ab1", 1.0),
    ("top left", "left", 0.0),
    ("red", "", 0.0),
    ("theatre", "atre", 0.0),
])  # fmt: skip
def test_exact_match(truth, prediction, verdict):
    assert asyncio.run(ExactMatchJudge().verdict("?", truth, prediction)) == verdict


def test_normalised():
    assert normalised(' "The  Cat\'s", no. 7: an apple ') == "cat's no 7 apple"
    assert normalised("...") == "..."
