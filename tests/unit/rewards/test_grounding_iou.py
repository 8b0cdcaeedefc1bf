"""The box in an answer, the spaces it may be in, and the reward's numbers."""

import asyncio

import pytest

from megatron_agent.errors import ConfigError
from megatron_agent.rewards.grounding_iou import GroundingIouReward, box_in
from megatron_agent.types import ImageRef, RewardParts, Status, Task, ToolCall, Trajectory, Turn, Unscored

SHOWN = ImageRef("s", width_px=400, height_px=100)  # of 800 x 400
TARGET = {"target_bbox": [100, 40, 300, 140], "image_size": [800, 400]}


@pytest.mark.parametrize(("answer", "box"), [
    ("[1, 2, 3, 4]", (1, 2, 3, 4)), ("(1,2,3.5,-4)", (1, 2, 3.5, -4)),
    ('{"bbox_2d": [10,20,30,40], "label": "cat"}', (10, 20, 30, 40)),
    ("box: [0.1, 0.2, 0.3, 0.4].", (0.1, 0.2, 0.3, 0.4)),
    ("1, 2, 3, 4", None), ("[1, 2, 3]", None), ("[1, 2, 3, 4, 5]", None), ("[1,2,3,4] or [5,6,7,8]", None), ("", None),
    ("[a, 2, 3, 4]", None), ("[1e3, 2, 3, 4]", None),
])  # fmt: skip
def test_box_in(answer, box):
    assert box_in(answer) == box


def score(text, extra_info=TARGET, calls=(), status=Status.ANSWERED, images=(SHOWN,), **options):
    task = Task("t", "grounding", (), images, "", "", "Where?", extra_info)
    turn = Turn([1], [0.0], [0], f"<think>a</think>{text}", "stop", tool_calls=list(calls))
    trajectory = Trajectory(task, 0, [1], [turn], status)
    return asyncio.run(GroundingIouReward(GroundingIouReward.Config(**options)).score(trajectory, task))


@pytest.mark.parametrize(("space", "box"), [
    ("original", "[100, 40, 300, 140]"), ("shown", "[50, 10, 150, 35]"), ("per_mille", "[125, 100, 375, 350]"),
    ("fraction", "[0.125, 0.1, 0.375, 0.35]"),
])  # fmt: skip
def test_one_region_in_every_space(space, box):
    found = score(f"<answer>{box}</answer>", space=space)
    assert found.parts == pytest.approx({"iou": 1.0, "accuracy": 1.0, "format": 0.0}) and found.total == pytest.approx(1.0)
    for other in {"original", "shown", "per_mille", "fraction"} - {space}:
        assert score(f"<answer>{box}</answer>", space=other).parts["iou"] < 0.5


def test_the_numbers():
    half = score("<answer>[100, 40, 200, 140]</answer>")
    assert half.parts == {"iou": 0.5, "accuracy": 1.0, "format": 0.0} and half.total == 0.5
    assert score("<answer>[100, 40, 200, 140]</answer>", right_iou=0.51).parts["accuracy"] == 0.0
    weighted = score("<answer>[100, 40, 200, 140]</answer>", iou_weight=2.0, accuracy_weight=3.0)
    assert weighted.total == 4.0
    assert score("<answer>nowhere</answer>").parts == {"iou": 0.0, "accuracy": 0.0, "format": 0.0}
    assert score("[100, 40, 300, 140]").total == pytest.approx(-0.2)  # not in an answer


def test_where_it_looked():
    looks = [
        ToolCall("zoom", True, box_px=(0, 0, 50, 50)),
        ToolCall("zoom", True, box_px=(100, 40, 300, 90)),
        ToolCall("zoom", False, box_px=(100, 40, 300, 140)),
        ToolCall("rotate", True),
    ]
    assert score("<answer>x</answer>", calls=looks, box="looked_at").parts["iou"] == 0.5
    assert score("<answer>[100, 40, 300, 140]</answer>", box="looked_at").parts["iou"] == 0.0


@pytest.mark.parametrize(("options", "reason"), [
    ({"extra_info": {}}, "target_bbox"),
    ({"extra_info": {"target_bbox": [1, 2, 3]}}, "target_bbox"),
    ({"extra_info": {"target_bbox": [1, 2, 3, 4]}, "space": "shown"}, "image_size"),
    ({"extra_info": TARGET | {"image_size": "big"}, "space": "fraction"}, "image_size"),
    ({"images": (), "space": "shown"}, "a picture"),
    ({"status": Status.ABORTED}, "aborted"),
])  # fmt: skip
def test_what_cannot_be_scored(options, reason):
    found = score("<answer>[1, 2, 3, 4]</answer>", **options)
    assert isinstance(found, Unscored) and reason in found.reason
    assert isinstance(score("<answer>[1, 2, 3, 4]</answer>", extra_info={"target_bbox": [1, 2, 3, 4]}), RewardParts)


@pytest.mark.parametrize(("options", "message"), [
    ({"box": "any"}, "'any'; allowed: answer, looked_at"), ({"space": "px"}, "allowed: original"),
    ({"right_iou": 0.0}, "above 0"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        GroundingIouReward.Config(**options)
