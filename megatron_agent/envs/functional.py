"""Pure helpers of the tool environments: finding tags and calls in a model's text, JSON schemas, checking arguments."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from megatron_agent.errors import EnvError

MAX_SHOWN_CHARS = 300
_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def between(text: str, start: str, end: str) -> list[str]:
    """What stands in every `start...end`; a start that is followed by another before its end does not count."""
    start, end = re.escape(start), re.escape(end)
    return re.findall(rf"{start}((?:(?!{start}).)*?){end}", text, re.DOTALL)


def last_tagged(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>`; an opening tag that is followed by another does not count."""
    found = between(text, f"<{tag}>", f"</{tag}>")
    return found[-1] if found else None


def printable(text: str) -> str:
    """Text that may echo the model's own, safe to tokenise and to write: no special token, no picture marker, no lone
    surrogate (JSON can spell one), not long."""
    text = text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
    return text.encode(errors="replace").decode().replace("<|", "< |").replace("<image>", "< image>")


def json_value(text: str, what: str = "the tool call") -> Any:
    """Raises EnvError that says what is wrong with the JSON of `what`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EnvError(f"{what} is not valid JSON: {error}") from error


def parse_call(call: str) -> tuple[str, dict[str, Any]]:
    """`{"name": ..., "arguments": {...}}` -> (name, arguments). Raises EnvError that says what is wrong.

    The arguments may be a text of JSON, as they are in OpenAI's messages.
    """
    value = json_value(call)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise EnvError('a tool call is {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", {})
    arguments = json_value(arguments, "the text of the arguments") if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise EnvError(f"the arguments of {value['name']} must be a JSON object, not {arguments!r}")
    return value["name"], arguments


def parse_flat_call(call: str, default_name: str) -> tuple[str, dict[str, Any]]:
    """`{"function": ..., <argument>: ...}`, or a list that begins with it -> (function, arguments).

    The function may be called `name` too, or be left out. Raises EnvError.
    """
    value = json_value(call)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, dict):
        raise EnvError(f'a call is {{"function": "{default_name}", ...}} with the arguments beside the function')
    function, name = value.pop("function", None), value.pop("name", None)
    function = function or name or default_name
    if not isinstance(function, str):
        raise EnvError(f"the function must be a text, got {function!r}")
    return function, value


def bind(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Check arguments from JSON against a typed method and convert them. Raises EnvError naming the argument."""
    name, (hints, parameters) = function.__name__, _declared(getattr(function, "__func__", function))
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        raise EnvError(f"{name} takes no argument {', '.join(map(repr, unknown))}; it takes {', '.join(parameters)}")
    missing = [key for key, parameter in parameters.items() if parameter.default is parameter.empty and key not in arguments]
    if missing:
        raise EnvError(f"{name} needs the argument {', '.join(map(repr, missing))}")
    return {key: _converted(value, hints[key], f"{name}: {key}") for key, value in arguments.items()}


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """OpenAI's function schema of a typed method.

    The docstring's first paragraph describes the function; lines `argument: text` after it describe the arguments.
    """
    hints, parameters = _declared(getattr(function, "__func__", function))
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    lines = dict(line.split(": ", 1) for line in "\n".join(paragraphs[1:]).splitlines() if ": " in line)
    properties = {}
    for key in parameters:
        properties[key] = _json_type(hints[key])
        if key in lines:
            properties[key]["description"] = lines[key].strip()
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": " ".join(paragraphs[0].split()),
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


@functools.cache  # evaluating annotations takes longer than a crop
def _declared(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, inspect.Parameter]]:
    """Types and parameters of a method, as its class has it."""
    parameters = {key: parameter for key, parameter in inspect.signature(function).parameters.items() if key != "self"}
    return typing.get_type_hints(function), parameters


def _json_type(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return {"type": "array", "items": _json_type(arguments[0])}
    if origin is typing.Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return _json_type(next(argument for argument in arguments if argument is not type(None)))
    assert hint in _JSON_TYPES, f"a tool's argument cannot be a {hint}; use int, float, str, bool, Literal or a list of them"
    return {"type": _JSON_TYPES[hint]}


def _converted(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        if not isinstance(value, list):
            raise EnvError(f"{where} must be a list, got {value!r}")
        return [_converted(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is typing.Literal:
        if value not in arguments:
            raise EnvError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _converted(value, next(a for a in arguments if a is not type(None)), where)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and _is_finite(value):
        return float(value)
    if hint is int and is_number and _is_finite(value) and value == int(value):
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise EnvError(f"{where} must be {'a finite number' if hint is float else _JSON_TYPES[hint]}, got {value!r}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False
