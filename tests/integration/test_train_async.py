"""The overlapped loop on real Ray, vLLM and Megatron processes: staleness within its bound, a restart that keeps the queue.

Whether a run learns as well as the synchronous one is not tested here (it takes minutes): see the README.
"""

import subprocess
import sys

import pytest

from megatron_agent.observe.metrics import read_metrics
from tests.integration.conftest import ROOT, RUN_YAML

pytestmark = pytest.mark.integration
QUICK = ["training.tensor_parallel=1", "evaluation.files=[]", "evaluation.without_tool_files=[]"]


def run(module, overrides):
    command = [sys.executable, "-m", f"megatron_agent.{module}", str(RUN_YAML), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def train_rows(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "train"]


def test_rollouts_run_ahead_and_a_restart_keeps_them(overrides, tmp_path):
    overrides += [*QUICK, "training.max_staleness=2", "checkpoint.every_steps=1", "observe.probe_every_steps=2"]
    run("train_async", [*overrides, "training.num_steps=5", "checkpoint.keep=0"])
    folder = tmp_path / "run"
    rows = train_rows(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["staleness_max"] == 0 and max(row["staleness_max"] for row in rows) in (1, 2)
    assert rows[0]["logprob_gap_mean"] <= 1e-5  # of tokens of the current weights; there may be none later
    assert all(row.get("logprob_gap_mean", 0.0) <= 1e-5 for row in rows) and "logprob_drift_mean" in rows[-1]
    probes = [row for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "probe"]
    assert [row["step"] for row in probes] == [2, 4] and all(0 < row["logprob_gap_max"] <= 1e-4 for row in probes)
    assert rows[-1]["queue/finished"] + rows[-1]["queue/under_way"] == 0  # nothing was generated for no step
    for name in ("step_00000004", "step_00000005"):  # as if killed after step 3
        (folder / "checkpoints" / name).rename(tmp_path / name)
    run("train_async", [*overrides, "training.num_steps=5", "resume=auto"])
    again = train_rows(folder)
    assert [row["step"] for row in again] == [1, 2, 3, 4, 5] and again[:3] == rows[:3]
    assert max(row["staleness_max"] for row in again) <= 2


def test_staleness_0_gives_the_numbers_of_the_synchronous_loop(overrides, tmp_path):
    overrides += QUICK
    run("train", [*overrides, "name=turns"])
    run("train_async", [*overrides, "name=ahead", "training.max_staleness=0"])
    for turns, ahead in zip(train_rows(tmp_path / "turns"), train_rows(tmp_path / "ahead"), strict=True):
        for name in ("loss", "grad_norm", "reward", "response_tokens", "weight_version", "staleness_max"):
            assert ahead[name] == pytest.approx(turns[name], rel=1e-4, abs=1e-6), name
