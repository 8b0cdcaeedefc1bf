"""Boards, displays and the metrics file, on real files. W&B is not covered beyond the message for its absence."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_agent.errors import ConfigError
from megatron_agent.observe.boards import Boards, ObserveConfig
from megatron_agent.observe.display import History, duration, log_line, sparkline
from megatron_agent.observe.live import LiveDisplay
from megatron_agent.observe.metrics import read_metrics

QUIET = ObserveConfig(display="none", tensorboard=False)


def test_metrics_round_trip(tmp_path: Path) -> None:
    with Boards(tmp_path / "run", QUIET, 2) as boards:
        boards.log(0, {"accuracy": 0.25}, phase="eval")
        boards.log(1, {"reward": 1 / 3, "loss": float("nan"), "seconds/train": float("inf"), "step": 99})
        rows = read_metrics(boards.metrics_path)  # flushed: readable while the run goes on
    assert [(row["step"], row["phase"]) for row in rows] == [(0, "eval"), (1, "train")]
    assert rows[1]["reward"] == 0.333333
    assert rows[1]["loss"] is None and rows[1]["seconds/train"] is None
    assert rows[0]["time"] > 1.7e9


def test_rewind_drops_only_later_steps(tmp_path: Path) -> None:
    with Boards(tmp_path, QUIET, 5) as boards:
        for step in range(1, 5):
            boards.log(step, {"reward": float(step)})
            boards.log(step, {"accuracy": 0.5}, phase="eval")
        boards.log(300, {"loss": 0.1}, phase="sft")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "tr')  # killed while writing
    with Boards(tmp_path, QUIET, 5) as boards:
        boards.rewind(3)
        boards.log(3, {"reward": 30.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["reward"]) for row in rows if row["phase"] == "train"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [row["step"] for row in rows if row["phase"] == "eval"] == [1, 2]
    assert [row["step"] for row in rows if row["phase"] == "sft"] == [300]  # the warm start is not done again
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_scalars_are_named_by_phase_and_rewound(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ObserveConfig(display="none")
    with Boards(tmp_path, config, 3) as boards:
        for step in (1, 2, 3):
            boards.log(step, {"reward": float(step), "loss": float("nan")})
        boards.log(1, {"accuracy": 0.5}, phase="eval")
    with Boards(tmp_path, config, 3) as boards:
        boards.rewind(3)
        boards.log(3, {"reward": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/reward", "eval/accuracy"}
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_log_display_writes_one_line_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_agent")
    with Boards(tmp_path, ObserveConfig(display="log", tensorboard=False), 60) as boards:
        boards.log(12, {"reward": 1.25, "accuracy": 0.5, "seconds/step": 5.0, "logprob_gap_mean": 0.0012})
        boards.log(12, {"accuracy": 0.75}, phase="eval")
    assert caplog.messages[0] == (
        "step 12/60 | reward 1.250 | acc 50.0% | tool - | iou - | resp - tok | gap 0.0012/- | "
        "rollout - train - sync - | - tok/s | left 4m 00s"
    )
    assert caplog.messages[1] == "eval step 12 | accuracy 0.750"


def test_log_line_without_any_metric() -> None:
    assert log_line(History(3), 1, {}, "train").startswith("step 1/3 | reward - |")
    assert log_line(History(3), 1, {}, "eval") == "eval step 1 | -"


@pytest.mark.parametrize("width", [80, 100])
def test_live_panel_fits_and_shows_missing_metrics_as_dashes(width: int) -> None:
    display = LiveDisplay("run", 60, Console(file=io.StringIO(), width=width))
    try:
        empty = _text(display, width)
        display.update(
            10, {"reward": 0.5, "accuracy": 0.25, "status/answered": 0.9, "reward/format": 1.0, "seconds/rollout": 2.0}, "train"
        )
        display.update(11, {"reward": 1.5, "seconds/step": 3.0}, "train")
        display.update(10, {"accuracy": 0.75}, "eval")
        full = _text(display, width)
    finally:
        display.close()
    assert "reward" in empty and "step 0/60" in empty and "left -" in empty
    assert "step 11/60" in full and "1.500" in full and "▁█" in full and "held-out" in full and "75.0%" in full
    assert "left 2m 27s" in full
    assert all(len(line) <= width for line in full.splitlines())


def test_live_panel_takes_the_log_lines_along(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    before = handler.stream
    try:
        console = Console(file=io.StringIO(), width=100, force_terminal=True)
        display = LiveDisplay("run", 1, console)
        assert handler.stream is sys.stderr is not before
        logging.getLogger("megatron_agent").warning("the gap is wide")
        display.note("checkpoint [1] written")
        display.close()
        assert handler.stream is before
    finally:
        logging.getLogger().removeHandler(handler)
    assert "the gap is wide" in console.file.getvalue() and "checkpoint [1] written" in console.file.getvalue()


def test_config_mistakes_name_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto, rich, log, none"):
        ObserveConfig(display="curses")
    with pytest.raises(ConfigError, match="transcripts_per_step is -1"):
        ObserveConfig(transcripts_per_step=-1)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install wandb"):
        Boards(tmp_path, ObserveConfig(display="none", wandb=True), 1)


def test_boards_import_nothing_heavy() -> None:
    code = (
        "import sys, megatron_agent.observe.boards, megatron_agent.observe.viewer.curves, "
        "megatron_agent.observe.viewer.contact_sheet; "
        "sys.exit(str([m for m in ('rich', 'torch', 'matplotlib', 'jinja2', 'tensorboard', 'numpy') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "[]"


def test_small_formats() -> None:
    assert [duration(value) for value in (None, 8.4, 250.0, 3725.0)] == ["-", "8s", "4m 10s", "1h 02m"]
    assert sparkline([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▄▄" and sparkline([]) == ""
    assert json.dumps(sparkline([-5.0, 5.0], 0.0, 1.0), ensure_ascii=False) == '"▁█"'


def _text(display: LiveDisplay, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(display.render())
    return console.export_text()
