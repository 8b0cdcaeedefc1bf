"""New weights into engines through vLLM's layerwise reload: one that quantises to fp8, on CPU, and one that does not.

Not covered: several tensor-parallel ranks, GPUs, the other kinds of fp8 (vLLM's kernels for CPU take one scale a row only).
"""

import json
import os
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints that differ in every weight."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    try:
        from tiny_model import write_model
    finally:
        sys.path.pop(0)
    folders = [tmp_path_factory.mktemp("models") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write_model(folder, ["system user assistant what color is it ? zoom red ."], seed)
    return [str(folder) for folder in folders]


@pytest.mark.parametrize("dtype, quantization", [("bfloat16", "fp8_per_channel"), ("float32", "")])
def test_a_synced_engine_is_one_that_loaded_the_weights(models, dtype, quantization):
    """Greedy answers with and without a picture, log-probs to the bit, and every parameter, scales included."""
    program = str(ROOT / "tests" / "integration" / "reload_in_one_process.py")
    arguments = [sys.executable, program, *models, dtype, quantization]
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    num_quantised, at_once = report.pop("quantised"), report.pop("layers at once")
    assert all(report.values()), report
    assert (num_quantised > 0) == bool(quantization)
    assert at_once <= 2, "unquantised memory of more than the layer under way and its neighbour"
