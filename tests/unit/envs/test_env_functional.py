"""Tags, tool calls, argument checks and JSON schemas."""

from typing import Literal

import pytest

from megatron_agent.envs.functional import bind, last_tagged, parse_call, printable, tool_schema
from megatron_agent.errors import EnvError


@pytest.mark.parametrize(("text", "content"), [
    ("<answer>a</answer> or <answer>b</answer>", "b"),
    ("<answer>a<answer>b</answer></answer>", "b"),
    ("<answer>\nx\n</answer></answer>", "\nx\n"),
    ("</answer><answer>", None),
    ("<answer></answer>", ""),
    ("", None),
])  # fmt: skip
def test_last_tagged(text, content):
    assert last_tagged(text, "answer") == content


def test_printable_carries_no_token():
    assert printable("<|image_pad|> <image>") == "< |image_pad|> < image>"
    assert len(printable("x" * 5000)) == 303


@pytest.mark.parametrize(("call", "why"), [
    ("{", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"name": 3}', '{"name": ..., "arguments": {...}}'),
    ("[1]", '{"name": ..., "arguments": {...}}'),
    ('{"name": "f", "arguments": [1]}', "must be a JSON object"),
    ('{"name": "f", "arguments": ' + "9" * 5000 + "}", "not valid JSON"),
])  # fmt: skip
def test_parse_call_refuses(call, why):
    with pytest.raises(EnvError) as caught:
        parse_call(call)
    assert why in str(caught.value)


def look(box: list[float], mode: Literal["near", "far"] = "near", times: int = 1, note: str | None = None, dry: bool = False):
    """Look at
    something.

    box: Where.
    times: How often: a count.
    """


def test_bind_converts():
    assert bind(look, {"box": [1, 2.5], "times": 3.0, "note": None}) == {"box": [1.0, 2.5], "times": 3, "note": None}


@pytest.mark.parametrize(("arguments", "why"), [
    ({}, "look needs the argument 'box'"),
    ({"box": [], "bbox": 1}, "look takes no argument 'bbox'; it takes box, mode, times, note, dry"),
    ({"box": 3}, "look: box must be a list"),
    ({"box": [1, "2"]}, r"look: box[1] must be a finite number, got '2'"),
    ({"box": [float("nan")]}, "finite"),
    ({"box": [10**400]}, "finite"),
    ({"box": [True]}, "finite"),
    ({"box": [], "times": 1.5}, "look: times must be integer, got 1.5"),
    ({"box": [], "dry": 1}, "look: dry must be boolean"),
    ({"box": [], "mode": "left"}, "must be one of 'near', 'far'"),
])  # fmt: skip
def test_bind_refuses(arguments, why):
    with pytest.raises(EnvError) as caught:
        bind(look, arguments)
    assert why in str(caught.value)


def test_schema():
    assert tool_schema(look) == {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at something.",
            "parameters": {
                "type": "object",
                "properties": {
                    "box": {"type": "array", "items": {"type": "number"}, "description": "Where."},
                    "mode": {"type": "string", "enum": ["near", "far"]},
                    "times": {"type": "integer", "description": "How often: a count."},
                    "note": {"type": "string"},
                    "dry": {"type": "boolean"},
                },
                "required": ["box"],
            },
        },
    }
