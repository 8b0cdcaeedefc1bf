"""tools/bench_train.py --quick: that every part runs, and that what it compares is the same model.

Not covered: how fast anything is.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

pytestmark = pytest.mark.distributed


def test_all_parts_run_and_losses_agree(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, TOOLS / "bench_train.py", "--quick", "--steps", "1", "--threads", "1", "--json", file]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    out = json.loads(file.read_text())
    step, packing, layouts = out["step"], out["packing"], out["layouts"]
    ways = {"ours", "one padded batch", "row by row"}
    assert set(step["seconds"]) == set(step["losses"]) == ways and step["faster"] in ways - {"ours"}
    assert step["loss_difference"] < 1e-5 and step["losses"]["ours"][1] < step["losses"]["ours"][0] - 0.01
    assert all(way in process.stdout for way in ways)

    assert packing["microbatches_packed"] < packing["microbatches_padded"] and packing["longest_over_mean"] > 2
    assert packing["loss_difference"] < 1e-5

    assert [row["layout"] for row in layouts] == ["PP 2", "PP 2 VPP 2", "TP 2"]
    losses = [row["loss"] for row in layouts]
    assert losses == pytest.approx([packing["loss"]] * 3, abs=1e-5)  # the same rows and weights
    pp, vpp, tp = layouts
    assert pp["idle_ideal"] == pytest.approx(1 / 5) and vpp["idle_ideal"] == pytest.approx(0.5 / 4.5)
    for row in (pp, vpp):
        assert row["microbatches"] == 4 and 0 < max(row["busy_s"]) < row["schedule_s"] < row["step_s"]
    assert tp["vision_imbalance"] > 1 and out["vision_balance"]["2"] >= 1
