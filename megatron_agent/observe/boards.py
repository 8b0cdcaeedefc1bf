"""Where the numbers of a run go: metrics.jsonl always; the console, TensorBoard and W&B as configured.

Steps count from 1: `step` is the number of updates that are done. An evaluation before training has step 0.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsFloat, TextIO

from megatron_agent.errors import ConfigError
from megatron_agent.observe.alarms import AlarmsConfig
from megatron_agent.observe.display import Display, LogDisplay, SilentDisplay
from megatron_agent.observe.metrics import drop_cut_line, read_metrics, rounded

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ROW_KEYS = ("step", "phase", "time")  # of a line of metrics.jsonl; the rest are metrics
DISPLAYS = ("auto", "rich", "log", "none")


@dataclass
class ObserveConfig:
    """`display`: "rich" is a live panel, "log" one line a step, "auto" the first on a terminal and the second elsewhere.

    `probe_every_steps`: of the overlapped loop, whose steps may hold no token of the current weights: how often a few are
    sampled for the log-prob gap (phase "probe"); 0: never.
    """

    display: str = "auto"
    tensorboard: bool = True
    wandb: bool = False
    transcripts_per_step: int = 4
    probe_every_steps: int = 10
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def __post_init__(self) -> None:
        if self.display not in DISPLAYS:
            raise ConfigError(f"observe.display is {self.display!r}; allowed: {', '.join(DISPLAYS)}")
        for name in ("transcripts_per_step", "probe_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"observe.{name} is {getattr(self, name)}; it must be 0 (none) or more")


class Boards:
    """Everything that shows the numbers of one run; a context manager.

    Produces `folder`/metrics.jsonl, one JSON object a line: step, phase, time (Unix seconds) and the metrics.
    """

    def __init__(self, folder: Path, config: ObserveConfig, total_steps: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.folder / "metrics.jsonl"
        self._config = config
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._wandb: Any = _start_wandb(self.folder) if config.wandb else None
        drop_cut_line(self.metrics_path)
        self._file: TextIO | None = None
        self._display = _make_display(config.display, self.folder.name, total_steps)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], phase: str = "train") -> None:
        """Record the metrics of one step of a phase ("train", "eval", "sft", ...) everywhere."""
        row = {"step": step, "phase": phase, "time": round(time.time(), 3)}
        numbers = {name: rounded(value) for name, value in metrics.items() if name not in ROW_KEYS}
        if self._file is None:
            self._file = self.metrics_path.open("a", encoding="utf-8")
        self._file.write(json.dumps({**row, **numbers}) + "\n")
        self._file.flush()
        finite = {name: value for name, value in numbers.items() if value is not None}
        self._log_tensorboard(step, finite, phase)
        if self._wandb is not None:
            self._wandb.log({f"{phase}/{name}": value for name, value in finite.items()} | {f"{phase}/step": step})
        self._display.update(step, finite, phase)

    def note(self, text: str) -> None:
        """Something worth a line of its own: a checkpoint was written, an engine was restarted."""
        self._display.note(text)

    def status(self, text: str) -> None:
        """What the run is doing now ("rollout", "training", "syncing weights")."""
        self._display.status(text)

    def rewind(self, step: int) -> None:
        """Forget training and evaluation from `step` on: a resumed run does them again. Call it before the first `log`.

        Lines of the warm start stay. What is kept fills the history of the display.
        """
        self._close_file()
        self._purge_step = step
        kept = [row for row in read_metrics(self.metrics_path) if row["phase"] == "sft" or row["step"] < step]
        aside = self.metrics_path.with_suffix(".jsonl.tmp")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.metrics_path)
        for row in kept:
            numbers = {name: value for name, value in row.items() if name not in ROW_KEYS and value is not None}
            self._display.replay(row["step"], numbers, row["phase"])

    def close(self) -> None:
        """Flush and end everything; may be called twice."""
        self._display.close()
        self._close_file()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _log_tensorboard(self, step: int, numbers: Mapping[str, float], phase: str) -> None:
        if not self._config.tensorboard:
            return
        if self._writer is None:
            # Opened at the first number, because TensorBoard takes the step to rewind to when the writer is made.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge_step)
        for name, value in numbers.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)
        self._writer.flush()


def _make_display(kind: str, run_name: str, total_steps: int) -> Display:
    if kind == "none":
        return SilentDisplay()
    if kind == "log" or (kind == "auto" and not sys.stdout.isatty()):
        return LogDisplay(total_steps)
    from megatron_agent.observe.live import LiveDisplay

    return LiveDisplay(run_name, total_steps)


def _start_wandb(folder: Path) -> Any:
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError("observe.wandb is true, but wandb is missing: pip install wandb, or observe.wandb=false") from error
    run = wandb.init(project="megatron_agent", name=folder.name, dir=str(folder))
    # W&B's own step may only grow, which the steps of several phases do not: each phase gets its own axis.
    for phase in ("sft", "train", "eval"):
        run.define_metric(f"{phase}/step")
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run
