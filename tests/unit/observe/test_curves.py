"""The figure of curves: that it is there, of sane size and holds lines and points. Its looks are for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megatron_agent.observe.boards import Boards, ObserveConfig
from megatron_agent.observe.viewer.curves import draw_curves, running_mean, series

TRAIN_RGB, EVAL_RGB = (0x25, 0x63, 0xEB), (0xEA, 0x58, 0x0C)


def test_curves_show_training_and_evaluation(tmp_path: Path) -> None:
    with Boards(tmp_path, ObserveConfig(display="none", tensorboard=False), 10) as boards:
        boards.log(0, {"accuracy": 0.2, "tool_rate": 0.4, "iou": 0.1}, phase="eval")
        for step in range(1, 11):
            boards.log(step, {"reward": 0.1 * step, "accuracy": 0.09 * step, "tool_rate": 0.5})
    out_png = tmp_path / "plots" / "curves.png"
    draw_curves(tmp_path / "metrics.jsonl", out_png, "a run")
    with Image.open(out_png) as picture:
        assert 1000 <= picture.width <= 2000 and 600 <= picture.height <= 1400
        pixels = picture.convert("RGB")
        counts = {color: count for count, color in pixels.getcolors(maxcolors=1 << 24) or []}
    assert counts[TRAIN_RGB] > 1000
    assert counts[EVAL_RGB] > 100


def test_curves_of_an_empty_run(tmp_path: Path) -> None:
    draw_curves(tmp_path / "missing.jsonl", tmp_path / "curves.png", "nothing yet")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_series_takes_the_later_of_two_rows() -> None:
    rows = [{"step": step, "phase": "train", "reward": reward} for step, reward in ((2, 1.0), (1, 3.0), (2, 5.0), (3, None))]
    assert series(rows, "train", "reward") == ([1, 2], [3.0, 5.0])
    assert running_mean([1.0, 3.0, 8.0], 2) == pytest.approx([1.0, 2.0, 5.5])
