"""Components by name: the file's name is the component's name; there is no list to edit."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

from megatron_agent.errors import ConfigError

_EXPORT = re.compile(r"^COMPONENT\s*[:=]", re.MULTILINE)


@functools.cache
def names(kind: str) -> tuple[str, ...]:
    """The components of an extension folder (`envs`, `rewards`, `algorithms`, `models`), sorted.

    A component is a file or folder whose source assigns COMPONENT; the others are what components share. Sources are
    read, not imported.
    """
    package = importlib.import_module(f"megatron_agent.{kind}")
    found = [m.name for m in pkgutil.iter_modules(package.__path__) if _EXPORT.search(_source(f"{package.__name__}.{m.name}"))]
    return tuple(sorted(found))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text() if spec is not None and spec.origin is not None else ""


@functools.cache
def resolve(kind: str, name: str) -> Any:
    """`resolve("envs", "visual_toolbox_v2")` -> the class that this file exports as `COMPONENT`.

    `pkg.mod:Class` names a class of the user's own. Raises ConfigError with the nearest known name.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{kind}: cannot load {name!r}: {error}; give it as 'package.module:Class'") from error
    if name not in names(kind):
        from difflib import get_close_matches

        near = get_close_matches(name, names(kind), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(names(kind))
        raise ConfigError(f"{kind}: unknown name {name!r}{hint or '.'} Known: {known}, or 'package.module:Class'")
    return importlib.import_module(f"megatron_agent.{kind}.{name}").COMPONENT
