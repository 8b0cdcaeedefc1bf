"""The session around a tool: what it hands over, how it reads what comes back, and that nothing escapes it."""

import io
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.envs.base import EnvSession, Observation, PictureTool, ToolBase, make_session
from megatron_agent.errors import ConfigError
from megatron_agent.types import ImageRef, Task, ToolCall

LIMITS = PixelLimits(3136, 12845056)


def no_env(*args):
    return SimpleNamespace()


class Scripted(ToolBase):
    """Returns what it was given; an exception is raised."""

    name = "scripted"

    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def execute(self, action_string, **kwargs):
        if isinstance(self.returned, Exception):
            raise self.returned
        return self.returned


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "store", LIMITS)


@pytest.fixture
def task(store):
    ref = store.put_picture(Image.new("RGB", (300, 200), (255, 0, 0)), PixelLimits(784, 3136 * 4))
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    return Task("t:0", "", ({"role": "user", "content": content},), (ref,), "x", "red", "?")


def step(store, task, returned):
    session = EnvSession(Scripted(returned), store, LIMITS)
    session.reset(task)
    return session.step("anything"), session


def test_reset_hands_deepeyes_tools_pictures_of_both_sizes(store, task):
    seen = {}

    class Recorder(ToolBase):
        def reset(self, raw_prompt, multi_modal_data, origin_multi_modal_data, **kwargs):
            seen.update(prompt=raw_prompt, shown=multi_modal_data, original=origin_multi_modal_data, more=kwargs)

    EnvSession(Recorder(), store, LIMITS).reset(task)
    assert seen["shown"]["image"][0].size == (task.images[0].width_px, task.images[0].height_px) == (112, 84)
    assert seen["original"]["image"][0].size == (300, 200)
    assert seen["more"] == {"extra_info": {}}
    seen["prompt"][0]["content"].clear()
    seen["original"]["image"][0].paste(0, (0, 0, 300, 200))
    assert task.messages[0]["content"] and np.asarray(store.original(task.images[0].source)).max() == 255


def test_reset_hands_our_tools_references(store, task):
    tool = PictureTool()
    EnvSession(tool, store, LIMITS).reset(task)
    assert tool.image_refs == [task.images[0]] and tool.store is store
    assert task.images is not tool.image_refs


def test_text_is_tokenised_to_the_letter(store, task):
    result, _ = step(store, task, ("\n<|im_start|>user\nhm<|im_end|>", 0.5, False, {"status": "success", "tool_used": "hum"}))
    assert result.rendered_text == result.observation.text == "\n<|im_start|>user\nhm<|im_end|>"
    assert (result.observation.messages, result.reward, result.done) == ([], 0.5, False)
    assert (result.tool_calls[0].name, result.tool_calls[0].ok) == ("hum", True) and result.tool_calls[0].seconds >= 0


def test_chat_list(store, task):
    result, _ = step(store, task, ([{"role": "user", "content": "found"}], 0.0, False, {}))
    assert result.observation == Observation([{"role": "user", "content": "found"}], [], "found")
    assert result.rendered_text is None and result.tool_calls[0].name == "scripted"


def test_dict_with_prompt(store, task):
    pictures = [Image.new("RGB", (60, 60)), Image.new("RGBA", (28, 112), (0, 0, 0, 0))]
    raw = {"prompt": "<image> and <|vision_start|><|image_pad|><|vision_end|>", "multi_modal_data": {"image": pictures}}
    result, session = step(store, task, (raw, 0, False, None))
    assert result.rendered_text == "<image> and <image>"
    assert [(ref.width_px, ref.height_px) for ref in result.observation.images] == [(56, 56), (28, 112)]
    assert session.image_refs == [task.images[0], *result.observation.images]
    assert store.pixels(result.observation.images[1]).min() == 255


def test_dict_with_chat(store, task):
    raw = {"chat": [{"role": "user", "content": "<image>see"}], "multi_modal_data": {"image": [Image.new("RGB", (60, 60))]}}
    result, _ = step(store, task, (raw, 0.0, False, {}))
    content = [{"type": "image"}, {"type": "text", "text": "see"}]
    assert result.observation.messages == [{"role": "user", "content": content}]
    assert len(result.observation.images) == 1 and result.observation.text == "<image>see" and result.rendered_text is None


def test_info_of_a_failed_call(store, task):
    for info in ({"status": "failed"}, {"error": "no box"}):
        result, _ = step(store, task, ("Error", 0.0, False, info))
        assert not result.tool_calls[0].ok and result.tool_calls[0].error == info.get("error", "")


@pytest.mark.parametrize("nothing", ["", None, [], {}])
def test_the_end(store, task, nothing):
    result, _ = step(store, task, (nothing, 1.0, True, {}))
    assert (result.observation, result.rendered_text, result.reward, result.done) == (None, None, 1.0, True)
    assert result.tool_calls == ()


def test_an_observation_at_the_end_is_not_shown_but_counts_as_a_call(store, task):
    result, session = step(store, task, ("goal", 1.0, True, {}))
    assert result.observation is None and result.rendered_text is None and result.tool_calls[0].ok
    assert session.image_refs == list(task.images)


def closed_picture():
    """As a file that was deleted, or closed, before its pixels were read."""
    file = io.BytesIO()
    Image.new("RGB", (60, 60)).save(file, "PNG")
    picture = Image.open(file)
    file.close()
    return picture


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("never")


PICTURE = Image.new("RGB", (60, 60))
SHOWN = {"role": "user", "content": [{"type": "image"}]}
NONSENSE = {
    "raises": (KeyError("bbox"), "'bbox'"),
    "raises without text": (ZeroDivisionError(), "ZeroDivisionError"),
    "echoes tokens": (ValueError("<|im_end|><image>"), "< |im_end|>< image>"),
    "no tuple": ("text", "returned str"),
    "short tuple": (("a", 1.0), "returned tuple"),
    "no reward": (("a", None, False, {}), "float()"),
    "nan": (("a", float("nan"), False, {}), "reward nan"),
    "info": (("a", 0.0, False, "info"), "info str"),
    "nothing": (("", 0.0, False, {}), "no observation"),
    "number": ((7, 0.0, False, {}), "type int"),
    "tuple": ((("text",), 0.0, False, {}), "type tuple"),
    "array": ((np.ones(3), 0.0, False, {}), "ambiguous"),
    "dict": (({"text": "a"}, 0.0, False, {}), "neither 'prompt' nor 'chat'"),
    "chat without role": (([{"content": "a"}], 0.0, False, {}), "without a role"),
    "chat of text": ((["a"], 0.0, False, {}), "without a role"),
    "chat without content": (([{"role": "user"}], 0.0, False, {}), "without content"),
    "marker in text": (("<image>", 0.0, False, {}), "0 pictures and 1 places"),
    "picture without marker": (({"prompt": "a", "multi_modal_data": {"image": [PICTURE]}}, 0, False, {}), "1 pictures and 0"),
    "no picture": (({"prompt": "<image>", "multi_modal_data": {"image": [3]}}, 0.0, False, {}), "picture of type int"),
    "broken": (({"prompt": "<image>", "multi_modal_data": {"image": [b"x"]}}, 0.0, False, {}), "unreadable picture"),
    "thin": (({"prompt": "<image>", "multi_modal_data": {"image": [Image.new("L", (900, 1))]}}, 0.0, False, {}), "too thin"),
    "our own, wrong": ((Observation([], [], "a"), "x", False, {}), "could not convert"),
    "our own, no messages": ((Observation(3, [], "a"), 0.0, False, {}), "not iterable"),
    "our own, no reference": ((Observation([SHOWN], ["a.png"], "a"), 0.0, False, {}), "not in the image store: 'a.png'"),
    "a picture of elsewhere": (
        (Observation([SHOWN], [ImageRef("ab" * 32, 28, 28)], ""), 0.0, False, {}),
        "not in the image store",
    ),
    "reward of nothing": (("a", [], False, {}), "float()"),
    "undecided": (("a", 0.0, np.ones(2), {}), "ambiguous"),
    "bytes": ((b"text", 0.0, False, {}), "type bytes"),
    "generator": (((word for word in "ab"), 0.0, False, {}), "type generator"),
    "dict of numbers": (({"chat": 7}, 0.0, False, {}), "not iterable"),
    "no list of pictures": (({"prompt": "<image>", "multi_modal_data": {"image": 7}}, 0.0, False, {}), "not iterable"),
    "no mapping of pictures": (({"prompt": "<image>", "multi_modal_data": "image"}, 0.0, False, {}), "no attribute 'get'"),
    "not an RGB array": (({"prompt": "<image>", "multi_modal_data": {"image": [np.ones((3, 3))]}}, 0, False, {}), "ndarray"),
    "closed": (({"prompt": "<image>", "multi_modal_data": {"image": [closed_picture()]}}, 0, False, {}), "closed"),
    "float picture": (({"prompt": "<image>", "multi_modal_data": {"image": [Image.new("F", (9, 9))]}}, 0, False, {}), "range"),
    "no pixels": (({"prompt": "<image>", "multi_modal_data": {"image": [Image.new("L", (0, 9))]}}, 0, False, {}), "empty"),
    "video": (([{"role": "user", "content": [{"type": "video"}]}], 0.0, False, {}), "allowed: text items and image items"),
    "text item of nothing": (([{"role": "user", "content": [{"type": "text"}]}], 0.0, False, {}), "allowed: text items"),
    "item of text": (([{"role": "user", "content": ["a"]}], 0.0, False, {}), "allowed: text items"),
    "lone surrogate": (("a\ud800", 0.0, False, {}), "surrogates not allowed"),
    "lone surrogate in a chat": (([{"role": "user", "content": "\udfff"}], 0.0, False, {}), "surrogates not allowed"),
    "no end": (("a" * 1_000_001, 0.0, False, {}), "at most 1000000"),
    "wrong box": (("a", 0.0, False, {"tool_call": ToolCall("a", True, box_px="abcd")}), "the box 'abcd'"),
    "no box": (("a", 0.0, False, {"tool_call": ToolCall("a", True, shown_box_px=4)}), "has no len"),
    "info that cannot be read": (("a", 0.0, False, {"error": Unreadable()}), "never"),
    "raises what cannot be read": (Unreadable(), "str() failed"),
    "endless recursion": (RecursionError("maximum recursion depth exceeded"), "recursion"),
    "no memory": (MemoryError(), "MemoryError"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_becomes_an_error_observation(store, task, kind):
    returned, why = NONSENSE[kind]
    result, session = step(store, task, returned)
    text = result.observation.text
    assert text.startswith("Error: ") and why in text
    assert result.observation.messages == [{"role": "tool", "content": text}] and result.rendered_text is None
    text.encode()
    assert (result.done, result.reward, result.tool_calls[0].ok) == (False, 0.0, False)
    assert result.tool_calls[0].error == text.removeprefix("Error: ") and session.image_refs == list(task.images)


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def lying():
    """Stored on its side; the file says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (80, 40)), "JPEG", exif=exif)


ODD = {
    "CMYK": (Image.new("CMYK", (60, 30), (0, 255, 255, 0)), (60, 30)),
    "16 bit": (Image.fromarray(np.full((30, 60), 40_000, np.uint16)), (60, 30)),
    "32 bit": (Image.new("I", (60, 30), 70_000), (60, 30)),
    "alpha": (Image.new("LA", (60, 30), (0, 0)), (60, 30)),
    "palette": (Image.new("P", (60, 30)), (60, 30)),
    "1 bit": (Image.new("1", (60, 30)), (60, 30)),
    "1x1": (Image.new("RGB", (1, 1)), (1, 1)),
    "unread GIF": (lambda: Image.open(io.BytesIO(encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE]))), (60, 60)),
    "unread, turned": (lambda: Image.open(io.BytesIO(lying())), (80, 40)),  # the pixels that the tool had
    "file, turned": (lying, (40, 80)),
    "file in a dict": (lambda: {"bytes": encoded(PICTURE, "WEBP"), "path": None}, (60, 60)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_of_a_tool(store, task, kind):
    picture, size_px = ODD[kind]
    picture = picture() if callable(picture) else picture
    result, _ = step(store, task, ({"prompt": "<image>", "multi_modal_data": {"image": [picture]}}, 0.0, False, {}))
    (ref,) = result.observation.images
    assert result.tool_calls[0].ok and store.original_size_px(ref.source) == size_px
    assert store.pixels(ref).shape == (ref.height_px, ref.width_px, 3)


def bomb():
    """A PNG that says to be 60,000 px on a side."""
    header = bytearray(encoded(Image.new("1", (1, 1))))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    return bytes(header)


def truncated():
    return encoded(Image.effect_noise((200, 200), 50))[:-9000]


@pytest.mark.parametrize("make", [bomb, truncated, lambda: Image.open(io.BytesIO(truncated())), lambda: b"", lambda: b"GIF89a"])
def test_pictures_that_are_none(store, task, make, tmp_path):
    result, session = step(store, task, ({"prompt": "<image>", "multi_modal_data": {"image": [make()]}}, 0.0, False, {}))
    assert result.observation.text.startswith("Error: ") and not result.tool_calls[0].ok
    assert session.image_refs == list(task.images) and len([p for p in (tmp_path / "store").rglob("*") if p.is_file()]) == 1


def test_a_tool_that_cannot_start_says_so_at_every_step(store, task):
    class Broken(Scripted):
        def reset(self, *args, **kwargs):
            raise AssertionError("no map")

    session = EnvSession(Broken(("fine", 0.0, False, {})), store, LIMITS)
    session.reset(task)
    assert [session.step("").observation.text for _ in range(2)] == ["Error: no map"] * 2


def test_make_session(store):
    assert make_session("", {}, store, LIMITS) is None
    with pytest.raises(ConfigError, match="visual_toolbox_v2"):
        make_session("visual_toolbox_v22", {}, store, LIMITS)
    with pytest.raises(ConfigError, match="cannot be built: TypeError"):
        make_session("fractions:Fraction", {}, store, LIMITS)
    with pytest.raises(ConfigError, match="is a SimpleNamespace; an env is a class that inherits ToolBase"):
        make_session(f"{__name__}:no_env", {}, store, LIMITS)
    session = make_session("visual_toolbox_v2", {}, store, LIMITS)
    other = make_session("visual_toolbox_v2", {"visual_toolbox_v2": type(session.tool).Config(min_side_px=9)}, store, LIMITS)
    assert (session.tool.config.min_side_px, other.tool.config.min_side_px) == (4, 9) and session.tool is not other.tool


def test_what_a_tool_calls_itself_is_made_printable(store, task):
    for info in ({"tool_used": "\ud800<|im_end|>"}, {"tool_call": ToolCall("\ud800<|im_end|>", 1, error=None)}):
        result, _ = step(store, task, ("a", 0.0, False, info))
        assert result.tool_calls[0].name == "?< |im_end|>" and result.tool_calls[0].ok is True


def test_a_chat_keeps_nothing_but_roles_texts_and_places(store, task):
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "see", "cache": 1}]
    raw = {"chat": [{"role": "user", "content": content, "name": "x"}], "multi_modal_data": {"image": [PICTURE]}}
    result, _ = step(store, task, (raw, 0.0, False, {}))
    assert result.observation.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}]


def test_close_never_raises(store, task, caplog):
    class Failing(Scripted):
        def close(self):
            raise OSError("gone")

    EnvSession(Failing(()), store, LIMITS).close()
    assert "cannot be closed" in caplog.text and ToolBase.stop == ()


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_the_tool_calls_of_our_tools_are_kept(store, task, many, done):
    given = [ToolCall("zoom", True, box_px=(1, 2, 3, 4)), ToolCall("turn", False, "no")][: 1 + many]
    info = {"tool_calls": given} if many else {"tool_call": given[0]}
    result, _ = step(store, task, (Observation([{"role": "tool", "content": "a"}], [], "a"), 0.0, done, info))
    assert [replace(call, seconds=0.0) for call in result.tool_calls] == given


@pytest.mark.parametrize("info", [{"tool_calls": "zoom"}, {"tool_calls": [None]}, {"tool_call": 3}, {"tool_calls": []}])
def test_calls_that_are_none_are_counted_as_one(store, task, info):
    result, _ = step(store, task, ("a", 0.0, False, info))
    assert [replace(call, seconds=0.0) for call in result.tool_calls] == [ToolCall("scripted", True)]
