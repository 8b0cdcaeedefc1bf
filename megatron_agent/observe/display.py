"""What a display of a run can do, the plain one (log lines), and how numbers are written for people."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger("megatron_agent")

MISSING = "-"
SPARKS = "▁▂▃▄▅▆▇█"
RECENT_STEPS = 20  # the remaining time is estimated from these


class Display(Protocol):
    """Shows metrics to a person. Numbers are finite; any may be missing."""

    def update(self, step: int, metrics: Mapping[str, float], phase: str) -> None: ...

    def replay(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """A step of an earlier run of the same folder: history, not news."""

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> None: ...

    def close(self) -> None: ...


class SilentDisplay:
    """Shows nothing."""

    def update(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        pass

    def replay(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class LogDisplay:
    """One compact line a step through the logger "megatron_agent", at level INFO."""

    def __init__(self, total_steps: int) -> None:
        self._history = History(total_steps)

    def update(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._history.add(step, metrics, phase)
        logger.info("%s", log_line(self._history, step, metrics, phase))

    def replay(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._history.add(step, metrics, phase)

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def status(self, text: str) -> None:
        logger.debug("%s", text)

    def close(self) -> None:
        pass


@dataclass
class History:
    """What a display remembers: the training rows so far and the last row of every other phase."""

    total_steps: int
    step: int = 0
    train: list[Mapping[str, float]] = field(default_factory=list)
    last: dict[str, tuple[int, Mapping[str, float]]] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)

    def add(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self.last[phase] = (step, metrics)
        if phase == "train":
            self.step = step
            self.train.append(metrics)

    def values(self, name: str, num_steps: int) -> list[float]:
        return [row[name] for row in self.train[-num_steps:] if name in row]

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def remaining_s(self) -> float | None:
        """From the mean of the last steps; None before the first."""
        seconds = self.values("seconds/step", RECENT_STEPS)
        return max(self.total_steps - self.step, 0) * sum(seconds) / len(seconds) if seconds else None


def log_line(history: History, step: int, metrics: Mapping[str, float], phase: str) -> str:
    """One step on one line."""
    if phase != "train":
        shown = [f"{name} {number(value)}" for name, value in metrics.items() if not name.startswith("seconds/")]
        return f"{phase} step {step} | {' | '.join(shown[:8]) or MISSING}"
    get = metrics.get
    return " | ".join(
        [
            f"step {step}/{history.total_steps}",
            f"reward {number(get('reward'))}",
            f"acc {percent(get('accuracy'))}",
            f"tool {percent(get('tool_rate'))}",
            f"iou {number(get('iou'))}",
            f"resp {number(get('response_tokens'), 0)} tok",
            f"gap {small(get('logprob_gap_mean'))}/{small(get('logprob_gap_max'))}",
            " ".join(f"{name} {seconds(get(f'seconds/{name}'))}" for name in ("rollout", "train", "sync")),
            f"{number(get('tokens_per_s'), 0)} tok/s",
            f"left {duration(history.remaining_s)}",
        ]
    )


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def small(value: float | None) -> str:
    """For what lives near zero and spans decades: gaps, rates, norms."""
    return MISSING if value is None else f"{value:.3g}"


def seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}s" if value < 10 else f"{value:.0f}s"


def duration(value_s: float | None) -> str:
    """1h 02m, 4m 10s or 8s."""
    if value_s is None:
        return MISSING
    minutes, rest_s = divmod(round(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest_s:02d}s" if minutes else f"{rest_s}s"


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """A line of block characters; the range is that of the values where `low` and `high` are not given."""
    if not values:
        return ""
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    span = high - low
    top = len(SPARKS) - 1
    if span <= 0:
        return SPARKS[top // 2] * len(values)
    return "".join(SPARKS[min(top, max(0, round((value - low) / span * top)))] for value in values)
