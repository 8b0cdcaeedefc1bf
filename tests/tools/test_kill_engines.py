"""Engines killed (kill -9) between turns and in a weight sync come back with the current weights, and nothing is lost.

Twenty and more rounds: `python tools/kill_engines.py --hf DIR` by hand (about 20 s each).
"""

import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


def test_an_engine_killed_in_turns_and_one_killed_in_a_sync(small_quickstart):
    command = [sys.executable, "tools/kill_engines.py", "--hf", str(small_quickstart / "model"), "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "killed during turns, all back" in done.stdout and "killed during a sync, all back" in done.stdout
    assert "2 rounds, 0 wrong" in done.stdout
