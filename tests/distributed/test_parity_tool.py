"""tools/parity.py as it is called, and its comparison of numbers with one of them wrong.

Not covered: layouts of more than two ranks (test_parity.py), real checkpoints, a rank that dies.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import parity  # noqa: E402
from _parity_ranks import RankResult, Reference  # noqa: E402

sys.path.remove(str(TOOLS))

pytestmark = pytest.mark.distributed


def run(*arguments):
    return subprocess.run([sys.executable, TOOLS / "parity.py", *map(str, arguments)], capture_output=True, text=True)


def test_three_layouts_of_a_tiny_model(tiny_models, tmp_path):
    file = tmp_path / "out.json"
    options = ["--layouts", "tp2sp,vpp2,dp2", "--rows", "3", "--adam-steps", "3", "--json", file]
    process = run("--hf", tiny_models["tied"], *options)
    assert process.returncode == 0, process.stdout + process.stderr
    out = json.loads(file.read_text())
    assert out["passed"] and out["failures"] == [] and out["num_rows"] == 3
    sizes = [size for row in out["pictures_px"] for size in row]
    assert out["pictures_px"][0] == [] and out["pictures_px"][1] == [[28, 28]] and [588, 28] in sizes and len(sizes) >= 4
    assert [(r["layout"], r["packed"]) for r in out["results"]] == [
        (name, packed) for name in ("tp2sp", "vpp2", "dp2") for packed in (True, False)
    ]
    for result in out["results"]:
        assert 0 < result["logprob_mean"] <= result["logprob_max"] <= 2e-5
        assert 0 < result["gradient_max"] == result["gradients"][result["gradient_worst"]] <= 1e-4
        assert set(result["gradients"]) == set(out["transformers"]["gradient_peaks"])
        assert len(result["losses"]) == 4 and result["losses"][3] < result["losses"][0] - 0.1
        assert result["losses"] == pytest.approx(out["transformers"]["losses"], abs=1e-5)
        assert result["layout"] in process.stdout
    assert out["loss_spread"] <= 1e-5


def test_a_text_model_in_uneven_stages(tiny_text_model, tmp_path):
    file = tmp_path / "out.json"
    process = run("--hf", tiny_text_model, "--layouts", "pp2", "--rows", "3", "--adam-steps", "2", "--json", file)
    assert process.returncode == 0, process.stdout + process.stderr
    out = json.loads(file.read_text())
    assert out["passed"] and out["pictures_px"] == [[], [], []]
    assert [result["stage_layers"] for result in out["results"]] == [[2, 1], [2, 1]]
    assert set(out["results"][0]["gradients"]) == set(load_file(tiny_text_model / "model.safetensors"))


def test_names_of_layouts(tiny_models):
    assert parity.parse_layout("one") == parity.Layout()
    assert parity.parse_layout("tp4") == parity.Layout(4)
    assert parity.parse_layout("vpp2") == parity.parse_layout("pp2vpp2") == parity.Layout(1, 2, virtual_pipeline=2)
    assert parity.parse_layout("pp4vpp2") == parity.Layout(1, 4, virtual_pipeline=2)
    assert parity.parse_layout("tp2cp2dp3sp") == parity.Layout(2, 1, 3, 2, sequence_parallel=True)
    layouts = parity.checked_layouts(" tp4, pp2 ", parity.family_of(tiny_models["tied"]))
    assert layouts == {"tp4": parity.Layout(4), "pp2": parity.Layout(1, 2, stage_layers=(1, 3))}  # the vision tower counts


def test_a_changed_tensor_is_found(tiny_models, tmp_path):
    """Megatron reads a copy with one other bias; transformers the original."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_models["untied"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors["visual.merger.mlp.2.bias"][5] += 0.05
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    options = ["--layouts", "one", "--rows", "3", "--adam-steps", "0"]
    process = run("--hf", copy, "--reference", tiny_models["untied"], *options)
    assert process.returncode == 1, process.stdout + process.stderr
    assert "PAST THE LIMIT  one packed: a log-prob is" in process.stdout
    assert "PAST THE LIMIT  one not packed: the gradient of" in process.stdout


REFERENCE = Reference([[-1.0, -2.0], [-3.0]], [2.0, 1.9], Path("none"), {"a": 2.0, "b": 1e-3})


def outcome(logprobs=((-1.0, -2.0), (-3.0,)), errors=(0.0, 0.0), last=1.9, name="tp2"):
    """Of two ranks, each with a row and a tensor of its own; transformers' numbers unless said otherwise."""
    (first, second), (a, b) = logprobs, errors
    results = [
        RankResult({0: list(first)}, {0: [-last, -last]}, [3.0], {"a": a, "b": 0.0}, 1),
        RankResult({1: list(second)}, {1: [-last]}, [3.0], {"b": b}, 1),
    ]
    return parity.compare(name, parity.Layout(2), True, results, REFERENCE, 0.0)


def test_equal_numbers_pass():
    result = outcome()
    assert parity.failures([result]) == []
    assert result.losses == pytest.approx([2.0, 1.9]) and result.loss_difference == pytest.approx(0)


def test_each_wrong_number_is_named():
    assert parity.failures([outcome(logprobs=((-1.0, -2.0), (-3.0001,)))]) == [
        "tp2 packed: a log-prob is 1.0e-04 off transformers' (limit 2e-05)"
    ]
    (line,) = parity.failures([outcome(errors=(1e-6, 2e-7))])
    assert line.startswith("tp2 packed: the gradient of b is 2.0e-04 off")  # relative: a's error is larger, b's counts
    assert parity.failures([outcome(last=1.90002)]) == [
        "tp2 packed: the loss after the Adam steps is 2.0e-05 off transformers' (limit 1e-05)"
    ]
    (line,) = parity.failures([outcome(last=1.900008), outcome(last=1.899992, name="pp2")])
    assert line.startswith("the losses of pp2 packed and tp2 packed after the Adam steps are 1.6e-05 apart")


@pytest.mark.parametrize(
    "broken", [dict(logprobs=((-1.0, math.nan), (-3.0,))), dict(errors=(0.0, math.nan)), dict(last=math.nan)]
)
def test_not_a_number_does_not_pass(broken):
    assert parity.failures([outcome(), outcome(**broken)])


def test_a_row_that_no_rank_reports_is_no_parity():
    half = [RankResult({0: [-1.0, -2.0]}, {0: [-1.0, -2.0]}, [], {"a": 0.0, "b": 0.0}, 1)]
    with pytest.raises(parity.IncomparableError, match=r"rows \[0\] were reported"):
        parity.compare("one", parity.Layout(), True, half, REFERENCE, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "tp2,zp2"], "layout 'zp2': unknown"),
        (["--layouts", "tp2tp4"], "layout 'tp2tp4': tp is given twice"),
        (["--layouts", "pp1vpp2"], "set training.pipeline_parallel above 1"),
        (["--layouts", "vpp3"], "layout 'vpp3': training.pipeline_parallel=2 x training.virtual_pipeline=3 is more than"),
        (["--layouts", "sp"], "layout 'sp': training.sequence_parallel splits rows over tensor ranks"),
        (["--layouts", "tp3"], "layout 'tp3': training.tensor_parallel=3 does not divide"),
        (["--rows", "2"], "--rows 2: 3 or more"),
        (["--hf", "nowhere"], "nowhere: no config.json"),
        (["--rows", "x"], "argument --rows: invalid int value"),
    ],
)
def test_bad_input_is_one_line(tiny_models, capsys, arguments, message):
    try:
        status = parity.main(["--hf", str(tiny_models["tied"]), *arguments])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
