"""Mappings of options -> dataclasses, strictly: every key and type is checked, unknown keys name their nearest kin."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, TypeVar

from megatron_agent import registry
from megatron_agent.errors import ConfigError

T = TypeVar("T")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def component_config(kind: str, name: object, options: object, where: str) -> Any:
    """The Config of the component `name`, filled from its options (None: none)."""
    require(isinstance(name, str), f"{where}: a name is text, got {name!r}")
    assert isinstance(name, str)
    component = registry.resolve(kind, name)
    require(hasattr(component, "Config"), f"{where}: {name!r} has no Config class")
    return build(component.Config, {} if options is None else options, where)


def build(cls: type[T], options: object, where: str) -> T:
    """Fill dataclass `cls` from a mapping, checking names and types. Raises ConfigError naming `where.key`."""
    require(isinstance(options, dict), f"{where}: expected a mapping of options, got {options!r}")
    assert isinstance(options, dict)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    reject_unknown(options, list(fields), where)
    hints = typing.get_type_hints(cls)
    values = {name: coerce(hints[name], value, f"{where}.{name}") for name, value in options.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def reject_unknown(options: dict, known: list[str], where: str) -> None:
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            shown = f"{where}.{key}" if where else str(key)
            raise ConfigError(f"unknown key {shown!r}{hint or '.'} Known: {', '.join(known)}")


def coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`. Raises ConfigError naming `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return coerce(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple):
        require(isinstance(value, (list, tuple)), f"{where}: expected a list, got {value!r}")
        return origin(coerce(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict or hint is dict:
        require(isinstance(value, dict), f"{where}: expected a mapping, got {value!r}")
        return {k: coerce(arguments[1], v, f"{where}.{k}") if arguments else v for k, v in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number: float | None = float(value)  # YAML 1.1 reads 1e-6 as a string
        except (ValueError, OverflowError):
            number = None
        if number is not None:
            require(math.isfinite(number), f"{where}: expected a finite number, got {value!r}")
            return number
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r} ({type(value).__name__})")
