"""What tells DeepEyes' picture tools apart: how a call is written, which call counts, who answers, when it ends."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_agent import registry
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import make_session
from megatron_agent.errors import ConfigError
from megatron_agent.types import Task

LIMITS = PixelLimits(784, 3136)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", LIMITS)


@pytest.fixture
def start(store):
    """A session over a picture of 224 x 224 px that is shown at 56 x 56."""

    def start(name, **options):
        noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
        configs = {name: registry.resolve("envs", name).Config(**options)}
        session = make_session(name, configs, store, LIMITS)
        session.reset(Task("t:0", "", (), (store.put_picture(Image.fromarray(noise)),), name, "", ""))
        return session

    return start


def tagged(**call):
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def fenced(call):
    return f"```json\n{json.dumps(call)}\n```"


def zoom(box, name="image_zoom_in_tool", key="bbox_2d"):
    return tagged(name=name, arguments={key: box})


def zoom_in(box):
    return zoom(box, "zoom_in", "region")


CALLS = {
    "visual_toolbox": (lambda box: zoom(box, key="bbox"), "image_zoom_in_tool", "user"),
    "visual_toolbox_v2": (zoom, "image_zoom_in_tool", "tool"),
    "visual_toolbox_v3": (lambda box: fenced({"function": "zoom_in", "bbox_2d": box, "label": "dog"}), "zoom_in", "user"),
    "visual_toolbox_v4": (lambda box: tagged(function="zoom_in", bbox_2d=box, label="dog"), "zoom_in", "tool"),
    "visual_toolbox_v5": (zoom, "image_zoom_in_tool", "tool"),
    "vl_agent_v2": (zoom_in, "zoom_in", "user"),
    "vl_agent_v3": (lambda box: fenced({"bbox_2d": box, "label": "dog"}), "zoom_in", "user"),
}
GOES_ON = {"visual_toolbox", "visual_toolbox_v4"}  # after a turn that neither calls nor answers
REWARDED = GOES_ON
FIRST = {"visual_toolbox", "visual_toolbox_v4", "vl_agent_v2", "vl_agent_v3"}  # of two calls


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_works(start, name):
    write, function, role = CALLS[name]
    session = start(name)
    result = session.step("<think>hm</think>" + write([4, 4, 24, 24]))
    (call,) = result.tool_calls
    assert (call.name, call.ok, call.box_px, call.shown_box_px) == (function, True, (16, 16, 96, 96), (4, 4, 24, 24))
    prompt = session.tool.config.user_prompt.replace("{box}", "[4, 4, 24, 24]")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    assert result.observation.messages == [{"role": role, "content": content}]
    assert result.observation.text == "<image>" + prompt
    assert result.reward == (0.5 if name in REWARDED else 0.0) and not result.done


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails(start, name):
    write, function, role = CALLS[name]
    session = start(name)
    result = session.step(write([4, 4, 4, 24]))
    assert [call.name for call in result.tool_calls] == [function] and not result.tool_calls[0].ok
    assert result.observation.messages == [{"role": role, "content": result.observation.text}]
    assert "holds nothing of the picture" in result.observation.text and result.reward == 0 and not result.done


@pytest.mark.parametrize("name", CALLS)
def test_the_end(start, name):
    write, _, role = CALLS[name]
    session = start(name)
    assert session.step("<answer>red</answer>").done and session.step(write([0, 0, 9, 9]) + "<answer>red</answer>").done
    result = session.step("just talk")
    assert result.done == (name not in GOES_ON)
    if not result.done:
        assert "neither a call in <tool_call></tool_call> nor an answer" in result.observation.text
        assert result.observation.messages[0]["role"] == role and not result.tool_calls[0].ok


@pytest.mark.parametrize("name", CALLS)
def test_which_of_two_calls_counts(start, name):
    write, _, _ = CALLS[name]
    boxes = [call.shown_box_px for call in start(name).step(write([0, 0, 9, 9]) + write([9, 9, 20, 20])).tool_calls]
    first, second = (0, 0, 9, 9), (9, 9, 20, 20)
    assert boxes == ([first, second] if name == "visual_toolbox_v5" else [first] if name in FIRST else [second])


@pytest.mark.parametrize("name", ["vl_agent_v2", "vl_agent_v3"])
def test_the_first_call_that_works_counts(start, name):
    write, _, _ = CALLS[name]
    result = start(name).step(write([9, 9]) + write([1, 1]) + write([9, 9, 20, 20]) + write([0, 0, 9, 9]))
    assert [call.shown_box_px for call in result.tool_calls] == [(9, 9, 20, 20)]
    assert "got 2 numbers" in start(name).step(write([9, 9]) + write("x")).observation.text


@pytest.mark.parametrize("name", CALLS)
def test_boxes_of_the_original(start, name):
    write, _, _ = CALLS[name]
    result = start(name, coordinate_space="original", user_prompt="see {box}").step(write([16, 16, 96, 96]))
    assert result.tool_calls[0].box_px == (16, 16, 96, 96) and result.observation.text == "<image>see [16, 16, 96, 96]"


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("visual_toolbox_v3") or name == "vl_agent_v3"])
@pytest.mark.parametrize("call", [
    {"bbox_2d": [1, 1, 9.5, 9]}, {"name": "zoom_in", "bbox_2d": [1, 1, 9.5, 9]}, [{"bbox_2d": [1, 1, 9.5, 9], "label": "a"}, 3],
])  # fmt: skip
def test_blocks(start, name, call):
    assert start(name).step(fenced(call)).tool_calls[0].shown_box_px == (1, 1, 10, 9)


@pytest.mark.parametrize(("call", "why"), [
    ([], "a call is"), (3, "a call is"), ({"function": 3, "bbox_2d": []}, "must be a text, got 3"),
    ({"function": "fly", "bbox_2d": []}, "there is no tool 'fly'; there are zoom_in"), ({"label": "a"}, "needs the argument"),
    ({"bbox_2d": [0, 0, 9, 9], "label": None}, "label must be string"),
])  # fmt: skip
def test_blocks_that_are_no_calls(start, call, why):
    assert why in start("visual_toolbox_v3").step(fenced(call)).observation.text
    assert why in start("visual_toolbox_v4").step(f"<tool_call>{json.dumps(call)}</tool_call>").observation.text


def test_a_block_in_another_language_is_no_call(start):
    assert start("visual_toolbox_v3").step("```python\n[1]\n```").done


BOX = [4, 4, 24, 24]


@pytest.mark.parametrize("arguments", [
    {"region": BOX}, {"bbox_2d": BOX}, {"region": {"bbox_2d": BOX}}, {"region": json.dumps({"bbox_2d": BOX})},
    {"region": json.dumps(BOX)}, {"region": {"bbox_2d": json.dumps(BOX)}}, json.dumps({"region": json.dumps({"bbox_2d": BOX})}),
])  # fmt: skip
def test_regions(start, arguments):
    assert start("vl_agent_v2").step(tagged(name="zoom_in", arguments=arguments)).tool_calls[0].shown_box_px == (4, 4, 24, 24)


@pytest.mark.parametrize(("arguments", "why"), [
    ({"region": "left"}, "the region is not valid JSON"), ({"region": {"box": BOX}}, "region must be a list, got None"),
    ({"region": "__import__('os')"}, "not valid JSON"), ("[", "the text of the arguments is not valid JSON"),
    ({"region": '"' * 3}, "not valid JSON"), ({}, "needs the argument 'region'"), ([BOX], "must be a JSON object"),
])  # fmt: skip
def test_regions_that_are_none(start, arguments, why):
    result = start("vl_agent_v2").step(tagged(name="zoom_in", arguments=arguments))
    assert why in result.observation.text and not result.tool_calls[0].ok


def test_rotation_and_unused_paths(start):
    session = start("visual_toolbox")
    result = session.step(tagged(name="image_rotate_tool", arguments={"angle": 90, "image_path": "a.jpg"}))
    assert result.observation.images[0].rotation_deg == 90 and result.reward == 0.5
    assert "takes no argument 'bbox_2d'" in session.step(zoom([0, 0, 9, 9])).observation.text
    text = start("visual_toolbox", user_prompt="{box}").step(tagged(name="image_rotate_tool", arguments={"angle": 9}))
    assert text.observation.text == "<image>[0, 0, 224, 224]"


# ---------------------------------------------------------------- several calls a turn
def test_several_calls(start, store):
    session = start("visual_toolbox_v5", user_prompt="Go on.")
    turned = tagged(name="image_rotate_tool", arguments={"angle": 180})
    result = session.step(zoom([4, 4, 24, 24]) + "and" + zoom([9, 9, 3, 3]) + turned)
    assert [(call.name, call.ok) for call in result.tool_calls] == [
        ("image_zoom_in_tool", True), ("image_zoom_in_tool", False), ("image_rotate_tool", True)]  # fmt: skip
    zoomed, failed, rotated = result.observation.messages
    assert zoomed == {"role": "tool", "content": [{"type": "image"}]}
    assert failed["content"] == f"Error: {result.tool_calls[1].error}" and "holds nothing" in result.tool_calls[1].error
    assert rotated["content"] == [{"type": "image"}, {"type": "text", "text": "Go on."}]  # once, at the end
    assert (
        [ref.rotation_deg for ref in result.observation.images] == [0, 180] == [r.rotation_deg for r in session.image_refs[1:]]
    )
    assert result.observation.text == f"<image>\nError: {result.tool_calls[1].error}\n<image>Go on."


def test_the_last_of_several_calls_fails(start):
    result = start("visual_toolbox_v5", user_prompt="Go on.").step(zoom([4, 4, 24, 24]) + tagged(name="fly"))
    first, last = result.observation.messages
    assert first["content"] == [{"type": "image"}] and last["content"] == f"Error: {result.tool_calls[1].error}\nGo on."
    assert result.observation.text == f"<image>\n{last['content']}" and len(result.observation.images) == 1


def test_all_of_several_calls_fail(start):
    result = start("visual_toolbox_v5").step(tagged(name="fly") + "<tool_call>{</tool_call>")
    assert [call.name for call in result.tool_calls] == ["fly", "visual_toolbox_v5"]
    assert result.observation.text == "\n".join(f"Error: {call.error}" for call in result.tool_calls)


def test_calls_of_a_turn_are_bounded(start):
    session = start("visual_toolbox_v5", max_calls_per_turn=2)
    result = session.step(zoom([0, 0, 9, 9]) * 1000)
    assert [call.ok for call in result.tool_calls] == [True, True, False] and len(session.image_refs) == 3
    assert result.tool_calls[2].error == "a turn may hold 2 calls; the last 998 of 1000 were left out"


def test_a_call_sees_no_picture_of_its_own_turn(start):
    session = start("visual_toolbox_v5")
    second = tagged(name="image_zoom_in_tool", arguments={"bbox_2d": [0, 0, 9, 9], "image_index": 1})
    result = session.step(zoom([4, 4, 24, 24]) + second)
    assert result.tool_calls[1].error == "there is no picture 1; there are 1, counted from 0"
    assert session.step(second).tool_calls[0].ok


def test_config_of_several_calls_refuses():
    with pytest.raises(ConfigError, match="max_calls_per_turn is 0"):
        registry.resolve("envs", "visual_toolbox_v5").Config(max_calls_per_turn=0)
