"""Every run.yaml of the examples parses, comes back, and is parsed without loading anything heavy.

Not covered: whether a run of it works (tests/integration), files that it names.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_agent.config import load, parse, to_dict
from megatron_agent.errors import ConfigError
from megatron_agent.stages import record_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples").rglob("*.yaml"))
PARSE_CPU_S = 6.0  # the plan says 3 s; the machine of the tests is shared


def test_there_are_examples():
    assert ROOT / "examples" / "quickstart" / "run.yaml" in CONFIGS
    assert {path.stem for path in CONFIGS if path.parent.name == "deepeyes"} == {
        f"qwen2_5_vl_{size}" for size in ("3b", "7b", "32b", "72b")
    }


@pytest.fixture(params=CONFIGS, ids=lambda p: p.relative_to(ROOT).as_posix())
def path(request):
    return request.param


def test_it_comes_back(path):
    config = load(path)
    tree = json.loads(json.dumps(to_dict(config)))  # as `megatron-agent check` prints it and a run records it
    assert parse(tree) == config and to_dict(parse(tree)) == tree


@pytest.mark.parametrize("overrides", [[], ["training.lr=1e-7", "algorithm=grpo", "rollout.dtype=auto", "seed=3"]])
def test_the_resolved_config_of_a_run_is_the_config(path, overrides, tmp_path):
    """What stages.record_config writes beside a run starts the same run again."""
    config = load(path, [*overrides, f"output_dir={tmp_path}"])
    record_config(config)
    again = load(config.folder / "config.yaml")
    assert again == config and to_dict(again) == to_dict(config)
    assert again.training.layout == config.training.layout


def test_it_takes_overrides(path):
    config = load(path, ["resume=auto", "training.lr=1e-5", "seed=3"])
    assert (config.resume, config.training.lr, config.seed) == ("auto", 1e-5, 3)
    with pytest.raises(ConfigError, match="did you mean 'resume'"):
        load(path, ["resum=auto"])


PROGRAM = """
import json, sys, time
from megatron_agent.config import load
for path in sys.argv[1:]:
    load(path)
heavy = [name for name in ("ray", "vllm", "megatron", "transformers") if name in sys.modules]
print(json.dumps({"heavy": heavy, "cpu_s": time.process_time()}))
"""


def test_parsing_is_light():
    command = [sys.executable, "-c", PROGRAM, *map(str, CONFIGS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == [] and found["cpu_s"] < PARSE_CPU_S


def test_check_prints_the_tree_and_names_mistakes():
    path = ROOT / "examples" / "deepeyes" / "qwen2_5_vl_7b.yaml"
    command = [sys.executable, "-m", "megatron_agent.cli", "check", str(path)]
    done = subprocess.run([*command, "training.lr=1e-5"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["training"]["lr"] == 1e-5
    done = subprocess.run([*command, "training.lr=fast"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "ConfigError: training.lr: expected float, got 'fast' (str)\n"
