"""Zoom and rotate: exact boxes in both coordinate spaces, and every way a call can be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import EnvSession
from megatron_agent.envs.visual_toolbox_v2 import VisualToolboxV2
from megatron_agent.errors import ConfigError
from megatron_agent.types import ImageRef, Task

LIMITS = PixelLimits(784, 3136)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", LIMITS)


@pytest.fixture
def start(store):
    """A session over a picture of 224 x 224 px that is shown at 56 x 56."""

    def start(**options):
        noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
        task = Task("t:0", "", (), (store.put_picture(Image.fromarray(noise)),), "visual_toolbox_v2", "", "")
        session = EnvSession(VisualToolboxV2(config=VisualToolboxV2.Config(**options)), store, LIMITS)
        session.reset(task)
        return session

    return start


def call(name="image_zoom_in_tool", **arguments):
    return f"<think>hm</think><tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_zoom_cuts_from_the_original(start, store):
    session = start()
    source = session.image_refs[0].source
    result = session.step(call(bbox_2d=[4, 4, 24, 24], label="red"))
    assert result.observation.images == [ImageRef(source, 84, 84, (16, 16, 96, 96))]
    prompt = session.tool.config.user_prompt
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    assert result.observation.messages == [{"role": "tool", "content": content}] and prompt
    assert (result.reward, result.done, result.rendered_text) == (0.0, False, None)
    tool_call = result.tool_calls[0]
    assert (tool_call.name, tool_call.ok, tool_call.error, tool_call.image_index) == ("image_zoom_in_tool", True, "", 0)
    assert (tool_call.box_px, tool_call.shown_box_px) == ((16, 16, 96, 96), (4, 4, 24, 24))
    expected = store.original(source).crop((16, 16, 96, 96)).resize((84, 84), Image.Resampling.BICUBIC)
    assert np.array_equal(store.pixels(result.observation.images[0]), np.asarray(expected))


def test_no_user_prompt(start):
    result = start(user_prompt="").step(call(bbox_2d=[0, 0, 56, 56]))
    assert result.observation.messages == [{"role": "tool", "content": [{"type": "image"}]}]


def test_boxes_are_clipped(start):
    tool_call = start().step(call(bbox_2d=[-5, 40.5, 30.25, 1e9])).tool_calls[0]
    assert tool_call.shown_box_px == (0, 40, 31, 56) and tool_call.box_px == (0, 162, 121, 224)


def test_original_space(start):
    session = start(coordinate_space="original")
    tool_call = session.step(call(bbox_2d=[17, 16, 96, 999])).tool_calls[0]
    assert tool_call.box_px == (17, 16, 96, 224) and tool_call.shown_box_px == (4, 4, 24, 56)
    assert session.step(call(bbox_2d=[10, 10, 50, 50], image_index=1)).tool_calls[0].box_px == (27, 26, 67, 66)
    assert "within 224 x 224 pixels" in session.step(call(bbox_2d=[300, 0, 400, 9])).observation.text


@pytest.mark.parametrize("key", ["image_index", "img_idx"])
def test_a_crop_of_a_crop(start, key):
    session = start()
    session.step(call(bbox_2d=[4, 4, 24, 24]))  # shown at 84 x 84, 80 x 80 px of the original
    tool_call = session.step(call(bbox_2d=[21, 42, 63, 84], **{key: 1})).tool_calls[0]
    assert (tool_call.image_index, tool_call.box_px) == (1, (36, 56, 76, 96))
    assert session.step(call(bbox_2d=[4, 4, 24, 24])).tool_calls[0].box_px == (16, 16, 96, 96)


def test_rotate_then_zoom(start):
    session = start()
    result = session.step(call("image_rotate_tool", angle=90))
    assert result.observation.images[0].rotation_deg == 90 and result.tool_calls[0].shown_box_px is None
    assert result.tool_calls[0].box_px == (0, 0, 224, 224) and result.observation.images[0].width_px == 224
    tool_call = session.step(call(bbox_2d=[0, 0, 56, 112], image_index=1)).tool_calls[0]
    assert tool_call.box_px == (112, 0, 224, 56)
    assert session.step(call("image_rotate_tool", angle=-450)).observation.images[0].rotation_deg == 270


def test_rotation_can_be_switched_off(start):
    session = start(rotate=False)
    assert "there is no tool 'image_rotate_tool'; there are image_zoom_in_tool" in session.step(
        call("image_rotate_tool", angle=90)).observation.text  # fmt: skip
    assert [schema["function"]["name"] for schema in session.tool.schemas()] == ["image_zoom_in_tool"]


@pytest.mark.parametrize("text", [
    "<think>a</think><answer>red</answer>", "just talk", "", "<tool_call>unfinished", "<answer></answer>",
    call(bbox_2d=[0, 0, 9, 9]) + "<answer>red</answer>", "</tool_call><tool_call>",
])  # fmt: skip
def test_the_end(start, text):
    result = start().step(text)
    assert result.done and result.observation is None and result.tool_calls == () and result.reward == 0.0


def test_the_last_call_counts(start):
    text = call(bbox_2d=[0, 0, 9, 9]) + call(bbox_2d=[10, 10, 20, 20])
    assert start().step(text).tool_calls[0].shown_box_px == (10, 10, 20, 20)


@pytest.mark.parametrize(("text", "name", "why"), [
    ("<tool_call>{</tool_call>", "visual_toolbox_v2", "not valid JSON"),
    ("<tool_call></tool_call>", "visual_toolbox_v2", "not valid JSON"),
    (call("zoom"), "zoom", "there is no tool 'zoom'; there are image_rotate_tool, image_zoom_in_tool"),
    (call("store"), "store", "there is no tool 'store'"),
    (call("<|image_pad|>"), "< |image_pad|>", "there is no tool '< |image_pad|>'"),
    (call(), "image_zoom_in_tool", "needs the argument 'bbox_2d'"),
    (call(bbox_2d=[1, 2, 3]), "image_zoom_in_tool", "got 3 numbers"),
    (call(bbox_2d="1,2,3,4"), "image_zoom_in_tool", "must be a list"),
    (call(bbox_2d=[0, 0, 9, None]), "image_zoom_in_tool", "finite number"),
    (call(bbox_2d=[0, 0, 9, float("inf")]), "image_zoom_in_tool", "finite number"),
    (call(bbox_2d=[20, 0, 10, 9]), "image_zoom_in_tool", "holds nothing of the picture"),
    (call(bbox_2d=[60, 0, 70, 9]), "image_zoom_in_tool", "within 56 x 56 pixels"),
    (call(bbox_2d=[0, 0, 3.5, 20]), "image_zoom_in_tool", "3.5 x 20 pixels is too small; at least 4"),
    (call(bbox_2d=[0, 0, 9, 9], image_index=1), "image_zoom_in_tool", "there is no picture 1; there are 1"),
    (call(bbox_2d=[0, 0, 9, 9], image_index=-1), "image_zoom_in_tool", "there is no picture -1"),
    (call("image_rotate_tool", angle="90"), "image_rotate_tool", "must be integer"),
    (call("image_rotate_tool", angle=0.5), "image_rotate_tool", "must be integer"),
    (call("image_rotate_tool", degrees=9), "image_rotate_tool", "takes no argument 'degrees'"),
])  # fmt: skip
def test_wrong_calls_are_told(start, text, name, why):
    session = start()
    result = session.step(text)
    assert why in result.observation.text and result.observation.text.startswith("Error: ")
    assert result.observation.messages == [{"role": "tool", "content": result.observation.text}]
    assert (result.done, result.tool_calls[0].ok, result.tool_calls[0].name) == (False, False, name)
    assert result.tool_calls[0].error == result.observation.text.removeprefix("Error: ") and len(session.image_refs) == 1


def test_thin_boxes(start):
    result = start(min_side_px=0, max_aspect_ratio=10).step(call(bbox_2d=[0, 0, 2, 21]))
    assert "2 x 21 pixels is too thin; at most 10 to 1" in result.observation.text
    assert start(min_side_px=0, max_aspect_ratio=10).step(call(bbox_2d=[0, 0, 2, 20])).tool_calls[0].ok


def test_no_picture_at_all(store):
    session = EnvSession(VisualToolboxV2(), store, LIMITS)
    session.reset(Task("t:0", "", (), (), "visual_toolbox_v2", "", ""))
    assert "there is no picture 0; there are 0" in session.step(call(bbox_2d=[0, 0, 9, 9])).observation.text


def test_schemas():
    zoom = {schema["function"]["name"]: schema for schema in VisualToolboxV2().schemas()}["image_zoom_in_tool"]["function"]
    assert zoom["parameters"]["required"] == ["bbox_2d"]
    assert list(zoom["parameters"]["properties"]) == ["bbox_2d", "label", "image_index"]
    assert zoom["parameters"]["properties"]["bbox_2d"]["items"] == {"type": "number"}


@pytest.mark.parametrize(("options", "why"), [({"coordinate_space": "shown"}, "'shown'; allowed: seen, original"),
                                              ({"max_pixels": 10}, "max_pixels=10"), ({"min_side_px": -1}, "-1"),
                                              ({"max_aspect_ratio": 500}, "500"),
                                              ({"call_reward": float("inf")}, "call_reward is inf")])  # fmt: skip
def test_config_refuses(options, why):
    with pytest.raises(ConfigError, match=why):
        VisualToolboxV2.Config(**options)
