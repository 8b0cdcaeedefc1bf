"""The whole program on real Ray, vLLM and Megatron processes: two steps, resume, and an end that leaves nothing behind.

Whether the quickstart learns is not tested here (it takes minutes): `make quickstart` shows it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_agent.observe.metrics import read_metrics
from tests.integration.conftest import ROOT, RUN_YAML

SUMMARY_KEYS = [
    *("accuracy_before", "accuracy_after", "accuracy_without_tool", "chance", "tool_rate_before", "tool_rate_after"),
    *("iou_before", "iou_after", "logprob_gap_mean", "logprob_gap_max", "num_trajectories", "seconds_setup"),
    *("seconds_train", "versions"),
]
pytestmark = pytest.mark.integration
QUICK = ["evaluation.files=[]", "evaluation.without_tool_files=[]", "sft.num_steps=1"]


def command(overrides):
    return [sys.executable, "-m", "megatron_agent.train", str(RUN_YAML), *overrides]


def run(overrides):
    done = subprocess.run(command(overrides), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def train_rows(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "train"]


LAYOUTS = {
    "tensor": [
        "rollout.ban_special_tokens=true",  # of a vocabulary that is split over the ranks
        "rollout.top_k=200",
        "rollout.top_p=0.98",
        "algorithm.name=ppo",
        "algorithm.critic={lr: 1.0e-3}",
        "training.offload=all",
    ],
    "pipeline": [
        "training.tensor_parallel=1",
        "training.pipeline_parallel=2",
        "rollout.oversample=0.5",
        "algorithm.kl={coefficient: 0.1, estimator: full}",
    ],
    "data": [
        "training.tensor_parallel=1",
        "training.data_parallel=2",
        "training.minibatches_per_step=2",
        "algorithm={name: reinforce_plus_plus, kl: {coefficient: 0.1, where: reward, estimator: k1}}",
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_then_resume(overrides, tmp_path, layout):
    overrides += LAYOUTS[layout]
    num_steps = 3 if layout == "tensor" else 2
    run([*overrides, f"training.num_steps={num_steps}"])
    folder = tmp_path / "run"
    rows = train_rows(folder)
    assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
    for row in rows:
        assert math.isfinite(row["loss"]) and row["grad_norm"] >= 0
        assert row["logprob_gap_mean"] <= 1e-5  # vLLM against Megatron, pictures included
        if layout != "data":
            assert row["ratio_max"] == 1.0  # one update per batch: the policy that sampled is the one that is updated
        assert row["first/ratio_deviation_max"] <= 1e-5 and row["first/clip_fraction"] == 0
        assert ("value_explained_variance" in row) == (layout == "tensor") and ("kl" in row) == (layout != "tensor")
    assert [row["weight_version"] for row in rows] == [step + 1.0 for step in range(1, num_steps + 1)]
    summary = json.loads((folder / "summary.json").read_text())
    assert {name for name in SUMMARY_KEYS if summary[name] is None} == set()
    assert summary["num_trajectories"] == 16 * num_steps
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "<img" in (folder / "trajectories.html").read_text()
    transcripts = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    names = ("weight_version_first", "weight_version_last")
    versions = {(t["step"], turn[name]) for t in transcripts for turn in t["turns"] for name in names if turn["num_tokens"]}
    assert versions == {(step, step) for step in range(1, num_steps + 1)}  # every token carries the version that sampled it
    if layout == "tensor":
        (folder / "checkpoints" / "step_00000003").rename(tmp_path / "step_00000003")  # as if killed after step 2
        run([*overrides, "training.num_steps=3", "resume=auto"])
        again = train_rows(folder)
        assert [row["step"] for row in again] == [1, 2, 3] and again[:2] == rows[:2]
        resumed, never_stopped = again[2], rows[2]
        for name in ("loss", "grad_norm", "value_loss", "value_grad_norm", "reward", "response_tokens", "weight_version"):
            assert resumed[name] == pytest.approx(never_stopped[name], rel=1e-4, abs=1e-6), name


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_leaves_no_process_behind(overrides, tmp_path, number):
    """In the middle of a run: 15 s later nothing of it is left; told to stop, it has saved its last finished step."""
    driver = subprocess.Popen(
        command([*overrides, *QUICK, "training.num_steps=1000", "checkpoint.every_steps=0"]),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stderr is not None
    for line in driver.stderr:
        if "step 1/1000" in line:
            break
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(below) >= 5  # two trainer ranks, an engine and its core, Ray's own
    os.kill(driver.pid, number)
    deadline = time.monotonic() + 15
    while (driver.poll() is None or any(p.is_running() for p in below)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    if number == signal.SIGKILL:
        assert driver.returncode == -signal.SIGKILL
    else:
        assert driver.returncode == 130
        assert any((tmp_path / "run" / "checkpoints").glob("step_????????/state.json"))
