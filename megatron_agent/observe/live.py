"""The live panel of a run on a terminal (rich). Imported only where it is shown."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_agent.observe.display import History, duration, number, percent, seconds, small, sparkline

SPARK_STEPS = 40
PHASES = (("rollout", "cyan"), ("train", "magenta"), ("sync", "yellow"))
LEARNING = (  # name on screen, metric, fixed range of the sparkline
    ("reward", "reward", None, None),
    ("accuracy", "accuracy", 0.0, 1.0),
    ("tool use", "tool_rate", 0.0, 1.0),
    ("IoU", "iou", 0.0, 1.0),
)


class LiveDisplay:
    """Redraws one panel in place, four times a second; notes and log lines scroll by above it."""

    def __init__(self, run_name: str, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._run_name = run_name
        self._history = History(total_steps)
        self._status = "starting"
        self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4)
        streams = (sys.stdout, sys.stderr)
        self._live.start()
        self._rerouted = _reroute_log_handlers(streams)

    def update(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._history.add(step, metrics, phase)
        self._live.refresh()

    def replay(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._history.add(step, metrics, phase)

    def note(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", markup=False, highlight=False)

    def status(self, text: str) -> None:
        self._status = text
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()
        for handler, stream in self._rerouted:
            handler.setStream(stream)
        self._rerouted = []

    def render(self) -> RenderableType:
        """The panel as of now; made for 100 columns, readable at 80."""
        row = self._history.train[-1] if self._history.train else {}
        parts: list[RenderableType] = [self._progress(), Text(), self._learning(row), Text(), self._machine(row)]
        parts += [line for line in (_ends(row), self._evaluation()) if line is not None]
        return Panel(
            Group(*parts),
            title=Text(self._run_name, style="bold"),
            subtitle=Text(f" {self._status} ", style="dim"),
            border_style="blue",
            padding=(1, 2),
            width=min(100, self.console.width),
        )

    def _progress(self) -> RenderableType:
        history = self._history
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_row(
            Text.assemble(("step ", "dim"), (f"{history.step}/{history.total_steps}", "bold")),
            ProgressBar(total=max(history.total_steps, 1), completed=history.step),
            Text.assemble(
                ("elapsed ", "dim"), duration(history.elapsed_s), ("   left ", "dim"), (duration(history.remaining_s), "bold")
            ),
        )
        return line

    def _learning(self, row: Mapping[str, float]) -> RenderableType:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", width=10)
        table.add_column(justify="right", width=9, style="bold")
        table.add_column(justify="right", width=9, style="dim")
        table.add_column(no_wrap=True, style="green")
        for label, name, low, high in LEARNING:
            values = self._history.values(name, SPARK_STEPS)
            show = number if name in ("reward", "iou") else percent
            mean = f"ø {show(sum(values[-10:]) / len(values[-10:]))}" if values else ""
            table.add_row(label, show(row.get(name)), mean, sparkline(values, low, high))
        return table

    def _machine(self, row: Mapping[str, float]) -> RenderableType:
        get = row.get
        gap = f"{small(get('logprob_gap_mean'))} mean {small(get('logprob_gap_max'))} max"
        cells = [
            ("response", f"{number(get('response_tokens'), 0)} tokens", "loss", small(get("loss")), "lr", small(get("lr"))),
            ("log-prob gap", gap, "grad norm", small(get("grad_norm")), "clipped", percent(get("clip_fraction"))),
            ("speed", f"{number(get('tokens_per_s'), 0)} tokens/s", "entropy", small(get("entropy")), "", ""),
        ]
        table = Table.grid(padding=(0, 2, 0, 0))
        for label_width, value_width in ((12, 23), (9, 8), (7, 8)):
            table.add_column(width=label_width, no_wrap=True, style="dim")
            table.add_column(width=value_width, no_wrap=True)
        for cell in cells:
            table.add_row(*cell)
        return Group(table, Text(), _phase_bar(row))

    def _evaluation(self) -> RenderableType | None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for phase, (step, row) in self._history.last.items():
            if phase == "train":
                continue
            if phase.startswith("eval"):
                name = "held-out" + phase.removeprefix("eval").replace("_", " ")
                cells = [("accuracy", percent(row.get("accuracy"))), ("tool use", percent(row.get("tool_rate")))]
                cells.append(("IoU", number(row.get("iou"))))
            elif phase == "probe":
                gap = (row.get("logprob_gap_mean"), row.get("logprob_gap_max"))
                name, cells = phase, [("log-prob gap", small(gap[0])), ("max", small(gap[1])), ("", "")]
            else:
                name, cells = phase, [("loss", small(row.get("loss"))), ("accuracy", percent(row.get("accuracy"))), ("", "")]
            values = [Text.assemble((f"{label} ", "dim"), value) for label, value in cells]
            table.add_row(Text(name, style="bold"), *values, Text(f"at step {step}", style="dim"))
        return Group(Text(), table) if table.row_count else None


def _phase_bar(row: Mapping[str, float], width: int = 68) -> RenderableType:
    """Where the seconds of a step go: a bar in proportion and its legend."""
    spent = [(name, color, row.get(f"seconds/{name}")) for name, color in PHASES]
    total_s = sum(value or 0.0 for _, _, value in spent)
    step_s = row.get("seconds/step", total_s or None)
    bar, legend = Text(), Text()
    for name, color, value in spent:
        bar.append("━" * (round(width * value / total_s) if value and total_s else 0), style=color)
        legend.append("■ ", style=color).append(f"{name} {seconds(value)}   ")
    legend.append("step ", style="dim").append(seconds(step_s), style="bold")
    return Group(legend, bar or Text("━" * width, style="dim"))


def _ends(row: Mapping[str, float]) -> Text | None:
    """How the episodes ended and what the reward was made of."""
    groups = [("episodes", "status/", percent), ("reward parts", "reward/", number)]
    lines = []
    for label, prefix, show in groups:
        present = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix) and value}
        shown = [f"{name} {show(value)}" for name, value in present.items()]
        if shown:
            lines.append(Text.assemble((f"{label:<14}", "dim"), "   ".join(shown)))
    return Text("\n").join([Text(), *lines]) if lines else None


def _reroute_log_handlers(streams: tuple[object, ...]) -> list[tuple[logging.StreamHandler, object]]:
    """Handlers keep the stream they were made with; a live panel swaps sys.stdout and sys.stderr and must get them too."""
    rerouted = []
    for handler in [*logging.getLogger().handlers, *logging.getLogger("megatron_agent").handlers]:
        if type(handler) is logging.StreamHandler and handler.stream in streams:
            rerouted.append((handler, handler.stream))
            handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)
    return rerouted
