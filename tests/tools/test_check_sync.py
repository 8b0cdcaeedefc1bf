"""Weights from four Megatron ranks into a real vLLM of two: answers and checksums as after loading them from disk.

The other pairs of layouts are left to `tools/check_sync.py` by hand (about five minutes).
"""

import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


def check_sync(*arguments):
    return subprocess.run(
        [sys.executable, "tools/check_sync.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )


def test_more_ranks_than_kv_heads_into_two(small_quickstart):
    done = check_sync("--hf", str(small_quickstart / "model"), "--train", "tp4", "--rollout", "tp2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("answers equal, checksums equal") == 2 and "0 differences" in done.stdout


def test_unknown_layouts():
    done = check_sync("--hf", "nowhere", "--train", "tp3")
    assert done.returncode == 2 and "unknown layouts ['tp3']" in done.stderr
