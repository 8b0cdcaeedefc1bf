"""Every file of envs/: whatever the model writes, a session answers; and tools written for DeepEyes run as they are.

MEGATRON_AGENT_FUZZ=10000 tries so many random episodes in every env, in place of 300.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_agent import registry
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import StepResult, ToolBase, make_session
from megatron_agent.models.qwen2_5_vl.renderer import Renderer
from megatron_agent.types import ImageRef, Task, ToolCall
from tests.conftest import WORDS, quickstart
from tests.contracts import deepeyes_tools

LIMITS = PixelLimits(784, 3136)
NUM_EXAMPLES = int(os.environ.get("MEGATRON_AGENT_FUZZ", "300"))
ENVS = registry.names("envs")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ImageStore(tmp_path_factory.mktemp("store"), LIMITS)


@pytest.fixture(scope="module")
def task(store):
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    ref = store.put_picture(Image.new("RGB", (224, 140), (1, 2, 3)))
    return Task("t:0", "vstar", ({"role": "user", "content": content},), (ref,), "x", "red", "Which?")


def check(result):
    """What the agent loop, the tokenizer and the transcripts rely on, whatever the tool."""
    assert isinstance(result, StepResult) and math.isfinite(result.reward)
    if result.done:
        assert result.observation is None and result.rendered_text is None
        return
    assert result.tool_calls and all(isinstance(call, ToolCall) and call.seconds >= 0 for call in result.tool_calls)
    observation = result.observation
    json.dumps(
        [observation.messages, observation.text, [vars(call) for call in result.tool_calls]], ensure_ascii=False
    ).encode()
    assert all(isinstance(ref, ImageRef) for ref in observation.images)
    if result.rendered_text is not None:
        assert not observation.messages and result.rendered_text.count("<image>") == len(observation.images)
        return
    assert observation.messages and all({"role", "content"} == set(message) for message in observation.messages)
    contents = [message["content"] for message in observation.messages]
    num_places = sum(item["type"] == "image" for content in contents if isinstance(content, list) for item in content)
    assert num_places == len(observation.images)
    for call in result.tool_calls:
        if not call.ok:
            assert call.error and "<|" not in observation.text


# ---------------------------------------------------------------- what a model may write
surrogates = st.characters(categories=["Cs"])  # JSON can spell half a character
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | surrogates | st.just([0, 0, 30, 30]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
boxes = st.lists(st.floats() | st.integers(-50, 300) | st.integers(), min_size=3, max_size=4)
names = (
    st.sampled_from(["image_zoom_in_tool", "image_rotate_tool", "zoom_in", "reset", "__init__"])
    | st.text(max_size=9)
    | surrogates
)
keys = st.sampled_from(["bbox_2d", "bbox", "region", "angle", "label", "image_index", "img_idx", "object", "image_path", "x"])
arguments = st.dictionaries(keys, json_values | boxes | boxes.map(json.dumps), max_size=3)
nested = st.fixed_dictionaries({"name": names, "arguments": arguments | arguments.map(json.dumps) | json_values})
flat = st.builds(lambda key, name, more: {key: name, **more}, st.sampled_from(["function", "name"]), names, arguments)
within = st.tuples(*[st.floats(0, 40) | st.integers(0, 40)] * 2, *[st.floats(20, 90) | st.integers(20, 300)] * 2).map(list)
usable = st.one_of(
    within.map(lambda box: {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box}}),
    within.map(lambda box: {"name": "image_zoom_in_tool", "arguments": {"bbox": box}}),
    within.map(lambda box: {"name": "zoom_in", "arguments": {"region": box}}),
    within.map(lambda box: {"function": "zoom_in", "bbox_2d": box}),
    st.text(max_size=5).map(lambda text: {"name": "zoom_in", "arguments": {"object": text}}),
    st.integers().map(lambda angle: {"name": "image_rotate_tool", "arguments": {"angle": angle}}),
)
inner = usable.map(json.dumps) | st.one_of(nested, flat, flat.map(lambda call: [call]), json_values).map(json.dumps)
inner = inner | st.text(max_size=40)
tags = st.sampled_from([
    *[("<tool_call>", "</tool_call>"), ("```json\n", "```")] * 3, ("<think>a</think><tool_call>", "</tool_call>"),
    ("<|begin_of_query|>", "<|end_of_query|>"), ("<answer>", "</answer>"), ("<tool_call>", ""), ("", "</tool_call>"), ("", ""),
    ("<tool_call>", "<|image_pad|></tool_call>"), ("\\boxed{", "}"), ("<action>", "</action>"),
])  # fmt: skip
written = st.lists(st.builds(lambda tag, text: tag[0] + text + tag[1], tags, inner), min_size=1, max_size=4).map("".join)


@pytest.mark.parametrize("name", ENVS)
def test_published_contract(name):
    component = registry.resolve("envs", name)
    assert issubclass(component, ToolBase) and component.name == name
    tool = component(None, None, None)
    assert isinstance(tool.config, component.Config)
    assert all(isinstance(text, str) and text for text in component.stop) and component.answer_role in ("tool", "user")
    functions = [schema["function"] for schema in tool.schemas()]
    assert all(function["name"] and function["description"] for function in functions) and json.dumps(functions)


def config_of(name):
    """The defaults; where a service is asked, one that never answers."""
    config = registry.resolve("envs", name).Config()
    if hasattr(config, "endpoints"):
        config = replace(config, endpoints=["http://127.0.0.1:9"], timeout_s=0.1, deadline_s=0.1, max_attempts=1)
    return config


@settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(written, min_size=1, max_size=3))
def test_any_text(store, task, actions):
    for name in ENVS:
        session = make_session(name, {name: config_of(name)}, store, LIMITS)
        session.reset(task)
        for action in actions:
            note(f"{name}: {action!r}")
            check(session.step(action))
        session.close()


@pytest.mark.parametrize("name", ENVS)
def test_episodes_do_not_leak_into_one_another(name, store, task):
    action = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [4, 4, 30, 30]}}</tool_call>'
    session = make_session(name, {name: config_of(name)}, store, LIMITS)
    session.reset(task)
    first = session.step(action).observation
    session.step(action)
    session.reset(task)
    assert session.image_refs == list(task.images) and session.step(action).observation == first


# ---------------------------------------------------------------- tools as they are written for DeepEyes
@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    quickstart().make_tokenizer([WORDS]).save_pretrained(folder)
    return Renderer(str(folder))


@pytest.fixture
def play(store, task, renderer):
    """Steps of an episode with one of the tools, each checked and turned into tokens as the agent loop does it."""

    def play(name, *actions):
        session = make_session(f"{deepeyes_tools.__name__}:{name}", {}, store, LIMITS)
        session.reset(task)
        for action in actions:
            result = session.step(action)
            check(result)
            if result.done:
                yield result, ""
                continue
            images = result.observation.images
            if result.rendered_text is not None:
                row = renderer.verbatim(result.rendered_text, images)
            else:
                row = renderer.observation(result.observation.messages, images, True)
            renderer.check_row(row, images)
            yield result, renderer.decode(renderer.collapse(row), special_tokens=True)

    return play


def test_their_source_names_us_once():
    assert Path(deepeyes_tools.__file__).read_text().count("megatron_agent") == 1


def test_notepad(play):
    one, two, failed, end = play("Notepad", "<note> a </note>", "<note>b</note><note>c</note>", "hm", "<answer>x</answer>")
    assert two[1] == "<|im_end|>\n<|im_start|>user\nNoted so far: a; b; c<|im_end|>\n<|im_start|>assistant\n"
    assert one[0].tool_calls[0].name == "note" and (failed[0].tool_calls[0].ok, failed[0].tool_calls[0].error) == (
        False, "nothing to note")  # fmt: skip
    assert end[0] == StepResult(None, None, 0.0, True)
    again, _ = next(play("Notepad", "<note>d</note>"))
    assert "so far: d<" in again.rendered_text


def test_notepad_declares_itself():
    (schema,) = deepeyes_tools.Notepad(None, None, None).schemas()
    assert schema["function"]["name"] == "notepad" and schema["function"]["parameters"]["required"] == ["line"]


def test_hint(play):
    (_, (result, text)) = play("Hint", "?", "?")
    assert text == "\n<|im_start|>user\nHint 2: look at the left half.<|im_end|>\n<|im_start|>assistant\n"
    assert result.reward == 0.1 and [call.name for call in result.tool_calls] == ["hint"]


def test_crop(play, store):
    call = '<tool_call>{"name": "crop", "arguments": {"bbox": [0, 0, 112, 140]}}</tool_call>'
    (result, text), (failed, _) = play("Crop", call + call, "<tool_call>left</tool_call>")
    assert [store.original_size_px(ref.source) for ref in result.observation.images] == [(112, 140)] * 2
    assert text.count("<tool_response><|vision_start|><|image_pad|><|vision_end|></tool_response>\n") == 2
    assert result.tool_calls[0].ok and not failed.tool_calls[0].ok and "Expecting value" in failed.rendered_text


def test_marker(play, store, task):
    (one, text), (two, _) = play("Marker", "mark 3, 3, 20, 20", "mark 20 3 40 20")
    assert text == (
        "\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nMarked.<|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )
    shown, first, second = (store.pixels(ref) for ref in (task.images[0], *one.observation.images, *two.observation.images))
    assert (first[3, 3] == (255, 0, 0)).all() and (first[3, 40] == (1, 2, 3)).all() and (second[3, 40] == (255, 0, 0)).all()
    assert (second[3, 3] == (255, 0, 0)).all() and np.all(shown == (1, 2, 3))  # the task's own picture has no mark


def test_guess(play):
    results = [result for result, _ in play("Guess", "50", "I say 25", "no number", "37")]
    assert [result.reward for result in results] == [-0.1, -0.1, 0.0, 1.0] and results[-1].done
    assert "between 25 and 50" in results[1].rendered_text and "no attribute 'group'" in results[2].observation.text
    assert [call.ok for call in results[-1].tool_calls] == [True]  # an answer that is not shown is a call all the same
