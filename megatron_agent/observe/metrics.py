"""Collecting numbers: seconds per phase, weighted means, and the JSON-lines files that a run leaves behind."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsFloat


class Timer:
    """Seconds per named phase. A phase that is entered twice adds up.

    >>> timer = Timer()
    >>> with timer.phase("rollout"): ...
    >>> timer.metrics()  # {"seconds/rollout": 0.0}
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with phase_timer(self.seconds, name):
            yield

    def metrics(self) -> dict[str, float]:
        """The phases as metrics, `seconds/<name>`."""
        return {f"seconds/{name}": value for name, value in self.seconds.items()}


@contextmanager
def phase_timer(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `seconds[name]`, also when the block raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


class MetricMean:
    """Weighted means by name: a micro-batch adds its value with its number of tokens as the weight."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: SupportsFloat, weight: float = 1.0) -> None:
        if weight < 0:
            raise ValueError(f"metric {name!r}: weight {weight} is negative")
        if weight == 0:
            return  # an empty micro-batch has no mean: its NaN must not reach the sum
        self._sums[name] = self._sums.get(name, 0.0) + float(value) * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_all(self, values: Mapping[str, SupportsFloat], weight: float = 1.0) -> None:
        for name, value in values.items():
            self.add(name, value, weight)

    def means(self) -> dict[str, float]:
        """Names that got no positive weight are absent."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


def rounded(value: SupportsFloat | None) -> float | int | None:
    """A number as it is written to JSON: six significant digits; None for what is not finite, which JSON cannot say."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order; see `read_json_lines`."""
    return read_json_lines(path)


def read_json_lines(path: str | Path) -> list[dict]:
    """Read a JSON-lines file. A last line that was cut (the writer was killed) is left out.

    A file that does not exist is empty. Raises ValueError for a damaged line anywhere else.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def drop_cut_line(path: Path) -> None:
    """Cut a JSON-lines file back to its last complete line, so that appending does not glue two lines together."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
