"""The published sizes in the layouts of the examples, every stage of every rank, without the memory for them.

Parameter counts are transformers' to the last one, the mapping table's boxes fill every parameter and nothing else, and the
layers are dealt by cost. Not covered: Transformer Engine's layers (their names are in the table, the library is not here),
numbers computed at these sizes, vLLM's side (tests/unit/weights).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SIZES = ("3b", "7b", "32b", "72b")
TEXT = ("text 7b", "text 32b")
PUBLISHED = {
    "3b": 3_754_622_976,
    "7b": 8_292_166_656,
    "32b": 33_452_718_336,
    "72b": 73_410_777_344,
    "text 7b": 7_615_616_512,
    "text 32b": 32_763_876_352,
}
TIED_IN_STAGES = ["training.pipeline_parallel=3", "training.tensor_parallel=4"]  # and more ranks than key/value heads
CASES = {
    **{size: (size, []) for size in SIZES + TEXT},
    "3b tp4 pp3": ("3b", TIED_IN_STAGES),
    "text 32b tp8 pp4 sp": ("text 32b", ["training.pipeline_parallel=4", "training.sequence_parallel=true"]),
}


def model_name(size):
    return f"qwen2_5_{size.removeprefix('text ')}" if size in TEXT else f"qwen2_5_vl_{size}"


def config_json(size):
    return ROOT / "tests" / "data" / f"{model_name(size)}.json"


def run_yaml(size):
    return (
        ROOT / "examples" / ("rag" if size in TEXT else "deepeyes") / f"{model_name(size)}{'_ppo' if size in TEXT else ''}.yaml"
    )


@pytest.fixture(scope="module")
def found():
    cases = [(str(config_json(size)), str(run_yaml(size)), overrides) for size, overrides in CASES.values()]
    program = Path(__file__).with_name("real_sizes.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program],
        input=json.dumps(cases),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_mib"] < 1500, "something of real size was allocated"
    return dict(zip(CASES, report["cases"], strict=True))


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2Config

    counts = {}
    for size in SIZES + TEXT:
        of_config, of_model = (
            (Qwen2Config, AutoModelForCausalLM) if size in TEXT else (Qwen2_5_VLConfig, AutoModelForImageTextToText)
        )
        with torch.device("meta"):
            model = of_model.from_config(of_config(**json.loads(config_json(size).read_text())))
        counts[size] = sum(p.numel() for p in model.parameters())
    return counts


def test_transformers_counts_what_is_published(theirs):
    assert theirs == PUBLISHED


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_as_many_as_transformers(found, theirs, case):
    size, _ = CASES[case]
    config = json.loads(config_json(size).read_text())
    assert found[case]["policy"]["parameters"] == theirs[size]
    head = 0 if config["tie_word_embeddings"] else config["vocab_size"]
    assert found[case]["value"]["parameters"] == theirs[size] + (1 - head) * config["hidden_size"]


@pytest.mark.parametrize("case", CASES)
def test_the_table_fills_every_parameter_of_every_rank(found, case):
    assert found[case]["policy"]["wrong"] == [] and found[case]["value"]["wrong"] == []


def test_the_stages_with_the_vision_tower_and_the_head_have_fewer_layers(found):
    layers = {case: of_case["stage_layers"] for case, of_case in found.items()}
    assert layers["3b"] == [] and layers["7b"] == []  # one stage
    assert layers["32b"] == [31, 33]
    assert layers["72b"] == [9, 10, 10, 10, 10, 10, 11, 10]  # 8 chunks of 4 ranks, in the order of the model
    assert layers["3b tp4 pp3"] == [1, 18, 17]
    assert [round(cost, 1) for cost in found["3b"]["costs"]] == [16.6, 1.0]  # in layers; a small model with the same tower


def test_the_gpus_that_the_examples_name(found):
    for size in SIZES + TEXT:
        text = run_yaml(size).read_text()
        assert f"{found[size]['world_size']} GPUs train" in text.splitlines()[0]
