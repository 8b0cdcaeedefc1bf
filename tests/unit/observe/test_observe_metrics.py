"""Timers, weighted means and JSON-lines files."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from megatron_agent.observe.metrics import MetricMean, Timer, drop_cut_line, phase_timer, read_metrics


def test_timer_adds_up_and_survives_an_error() -> None:
    timer = Timer()
    for _ in range(2):
        with timer.phase("rollout"):
            time.sleep(0.01)
    with pytest.raises(KeyError), phase_timer(timer.seconds, "train"):
        raise KeyError
    assert 0.02 <= timer.seconds["rollout"] < 1
    assert set(timer.metrics()) == {"seconds/rollout", "seconds/train"}


def test_metric_mean_weighs_and_skips_empty_weights() -> None:
    mean = MetricMean()
    mean.add_all({"loss": 1.0, "entropy": 2.0}, weight=3)
    mean.add("loss", 5.0, weight=1)
    mean.add("loss", math.nan, weight=0)
    mean.add("gap", math.nan, weight=0)
    assert mean.means() == {"loss": 2.0, "entropy": 2.0}
    with pytest.raises(ValueError, match="'loss'"):
        mean.add("loss", 1.0, weight=-1)


def test_read_metrics_leaves_out_a_cut_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(path) == [{"step": 1}]
    drop_cut_line(path)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)
