"""The benches that measure rollouts without a model still run; what they measure is for the README, not for a test.

Not covered: bench_rollout.py and bench_data.py (minutes), bench_weight_sync.py (a model of 0.5 B parameters).
"""

import json
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_overlap(small_quickstart, tmp_path):
    """Devices that sleep for milliseconds, in the real loops."""
    file = tmp_path / "found.json"
    options = ["--steps", "8", "--staleness", "1", "--turn-s", "0.005", "--json", str(file)]
    done = run("tools/bench_async.py", "--data", str(small_quickstart), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert [row["ratio"] for row in found] == ["1:1", "1:3", "3:1"] * 2
    assert all(row["turns"]["lag_max"] == 0 and row["ahead"]["lag_max"] == 1 for row in found)
    refused = run("tools/bench_async.py", "--data", str(small_quickstart), "--steps", "8", "--staleness", "4")
    assert refused.returncode == 2 and "--steps 8: give 14 or more" in refused.stderr


def test_pictures(tmp_path):
    file = tmp_path / "found.json"
    options = ["--prompts", "2", "--rollouts", "2", "--opened", "1", "--copied", "1", "--json", str(file)]
    done = run("tools/bench_images.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["stored_files"] == 2 and found["files_sent"] > 10 * found["sent_bytes"] > 0
