"""Every file of envs/: whatever the model writes, a session answers; and tools written for DeepEyes run as they are."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_agent import registry
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import EnvSession, StepResult, ToolBase, make_session
from megatron_agent.types import ImageRef, Task, ToolCall

LIMITS = PixelLimits(784, 3136)
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
    """What the agent loop relies on, whatever the tool."""
    assert isinstance(result, StepResult) and math.isfinite(result.reward)
    if result.done:
        assert result.observation is None and result.rendered_text is None
        return
    assert result.tool_calls and all(isinstance(call, ToolCall) and call.seconds >= 0 for call in result.tool_calls)
    observation = result.observation
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([0, 0, 30, 30]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
boxes = st.lists(st.floats() | st.integers(-50, 300), min_size=4, max_size=4)
keys = st.sampled_from(["bbox_2d", "angle", "label", "image_index", "img_idx", "x"])
names = st.sampled_from(["image_zoom_in_tool", "image_rotate_tool", "reset", "__init__"]) | st.text(max_size=12)
calls = (
    st.fixed_dictionaries({"name": names, "arguments": st.dictionaries(keys, json_values | boxes, max_size=3)}) | json_values
)
texts = st.text(max_size=40) | calls.map(json.dumps)
tagged = st.tuples(st.sampled_from(["<tool_call>", "<think>a</think><tool_call>", "<answer>", ""]), texts,
                   st.sampled_from(["</tool_call>", "</answer>", "<|image_pad|>", ""])).map("".join)  # fmt: skip


@pytest.mark.parametrize("name", ENVS)
def test_published_contract(name):
    component = registry.resolve("envs", name)
    assert issubclass(component, ToolBase) and component.name == name
    tool = component(None, None, None)
    assert isinstance(tool.config, component.Config)
    json.dumps(tool.schemas())


@pytest.mark.parametrize("name", ENVS)
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(tagged, min_size=1, max_size=3))
def test_any_text(name, store, task, actions):
    session = make_session(name, {}, store, LIMITS)
    session.reset(task)
    for action in actions:
        check(session.step(action))


@pytest.mark.parametrize("name", ENVS)
def test_episodes_do_not_leak_into_one_another(name, store, task):
    action = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [4, 4, 30, 30]}}</tool_call>'
    session = make_session(name, {}, store, LIMITS)
    session.reset(task)
    first = session.step(action).observation
    session.step(action)
    session.reset(task)
    assert session.image_refs == list(task.images) and session.step(action).observation == first


# ---------------------------------------------------------------- tools as they are written for DeepEyes
class TextTool(ToolBase):
    name = "text_tool"

    def __init__(self, _name, _desc, _params, **kwargs):
        super().__init__(name=self.name)
        self.history = []

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
        self.history = raw_prompt
        assert len(origin_multi_modal_data["image"]) > 0

    def execute(self, action_string, **kwargs):
        if "<answer>" in action_string:
            return "", 0.0, True, {}
        return f"\n<|im_start|>user\nyou said {action_string}<|im_end|>\n<|im_start|>assistant\n", 0.0, False, {}


class ChatTool(TextTool):
    name = "chat_tool"

    def execute(self, action_string, **kwargs):
        return [{"role": "user", "content": "go on"}], 0.1, False, {"status": "success"}


class PromptTool(TextTool):
    name = "prompt_tool"

    def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
        self.multi_modal_data = origin_multi_modal_data

    def execute(self, action_string, **kwargs):
        half = self.multi_modal_data["image"][0].crop((0, 0, 112, 140))
        prompt = "\n<|im_start|>user\n<tool_response><image></tool_response><|im_end|>\n<|im_start|>assistant\n"
        return {"prompt": prompt, "multi_modal_data": {"image": [half]}}, 0.0, False, {"tool_used": "crop"}


class ChatPictureTool(PromptTool):
    name = "chat_picture_tool"

    def execute(self, action_string, **kwargs):
        chat = [{"role": "user", "content": "<image>\nthe whole"}]
        return {"chat": chat, "multi_modal_data": {"image": self.multi_modal_data["image"]}}, 0.0, False, {}


@pytest.mark.parametrize("tool_class", [TextTool, ChatTool, PromptTool, ChatPictureTool])
def test_deepeyes_tools_run(tool_class, store, task):
    session = EnvSession(tool_class("n", "d", {}), store, LIMITS)
    session.reset(task)
    results = [session.step("<think>a</think>") for _ in range(2)]
    for result in results:
        check(result)
        assert result.tool_calls[0].ok, result.tool_calls[0].error
    expected_pictures = 2 if tool_class in (PromptTool, ChatPictureTool) else 0
    assert len(session.image_refs) == 1 + expected_pictures
    if tool_class is TextTool:
        assert session.step("<answer>x</answer>") == StepResult(None, None, 0.0, True)


def test_a_tool_of_the_users_own_by_path(store, task):
    session = make_session(f"{__name__}:PromptTool", {}, store, LIMITS)
    session.reset(task)
    result = session.step("look")
    assert result.tool_calls[0].name == "crop" and store.original_size_px(result.observation.images[0].source) == (112, 140)
