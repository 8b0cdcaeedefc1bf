"""tools/simulate_sync.py as it is called: its figures for layouts whose answer is known, its JSON, what it refuses.

Not covered: that a real cluster reaches the bound.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "tools"))
from simulate_sync import main  # noqa: E402

CALL = ["--model", "qwen2.5-vl-32b", "--train", "tp=8,pp=2,dp=4", "--rollout", "tp=4,replicas=16"]


def test_the_call_of_the_readme(tmp_path, capsys):
    """33.45e9 parameters of 2 bytes over 4 ranks, 50 GB/s a link: 0.3346 s; 64 senders send what 64 receivers get."""
    file = tmp_path / "result.json"
    assert main([*CALL, "--gpus-per-node", "8", "--link-gbps", "400", "--nvlink-gbps", "3600", "--json", str(file)]) == 0
    out, result = capsys.readouterr().out, json.loads(file.read_text())
    assert result["gpus"] == 128 and not result["colocated"] and result["received_over_live"] == 1.0
    assert result["limit_s"] == pytest.approx(0.3346, abs=1e-4) == result["received_bytes_of_a_rank"] / 50e9
    assert 1.0 <= result["ratio"] <= 1.02 and result["ratio"] == result["bound_s"] / result["limit_s"]
    sent, links = result["sent_bytes_of_training_ranks"], result["bytes_of_links"]
    assert len(sent) == 64 and sum(sent) == 64 * result["received_bytes_of_a_rank"]
    assert sum(n for link, n in links.items() if link.startswith("nic_in")) == sum(sent)
    assert links[result["busiest_link"]] == max(links.values())
    assert "ratio 1.0" in out and "(simulated)" in out and result["busiest_link"] in out and "max/mean 1.0" in out


def test_a_thousand_gpus_are_planned_in_time(tmp_path, capsys):
    """CPU seconds, for what else runs here must not count; the process holds the other tests' memory too."""
    file = tmp_path / "result.json"
    call = ["--model", "qwen2.5-vl-72b", "--train", "tp=8,pp=4,dp=16", "--rollout", "tp=8,replicas=64", "--json", str(file)]
    assert main(call) == 0
    result = json.loads(file.read_text())
    assert result["gpus"] == 1024 and result["ratio"] <= 1.2 and result["planning"]["cpu_s"] < 10
    assert result["planning"]["peak_mib"] < 2048


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_the_layouts_of_the_examples_are_near_the_limit(tmp_path, capsys, size):
    file, run = tmp_path / "result.json", ROOT / "examples" / "deepeyes" / f"qwen2_5_vl_{size}.yaml"
    for colocated in ([], ["--colocated"]):
        assert main(["--model", f"qwen2.5-vl-{size}", "--run", str(run), "--json", str(file), *colocated]) == 0
        result = json.loads(file.read_text())
        assert result["ratio"] - 1e-9 <= result["scheduled_ratio"] <= 1.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["--train", "tp=4"], "give --train and --rollout, or --run FILE"),
        (["--train", "tp=four", "--rollout", "tp=1"], "'tp=four' in 'tp=four': give KEY=NUMBER, comma-separated, of tp, pp"),
        (["--train", "tp=4", "--rollout", "ep=1"], "'ep=1' in 'ep=1'"),
        (["--train", "tp=4", "--rollout", "tp=2,pp=2"], "rollout.pipeline_parallel=2"),
        (["--train", "tp=8", "--rollout", "tp=1"], "training.tensor_parallel=8 does not divide the model's attention heads"),
        (["--train", "tp=4", "--rollout", "tp=1", "--gpus-per-node", "0"], "gpus_per_node=0"),
        (["--model", "gpt", "--train", "tp=4", "--rollout", "tp=1"], "known by name: qwen2.5-vl-32b"),
    ],
)
def test_calls_that_cannot_be(capsys, call, message):
    assert main(call) == 2
    assert message in capsys.readouterr().err
