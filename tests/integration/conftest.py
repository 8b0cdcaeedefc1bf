"""The quickstart's model and a small cut of its data, and its configuration on them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN_YAML = ROOT / "examples" / "quickstart" / "run.yaml"


@pytest.fixture(scope="session")
def small_quickstart(tmp_path_factory):
    """A folder as prepare_data.py makes it, with tens of rows instead of thousands."""
    sys.path.insert(0, str(RUN_YAML.parent))
    try:
        import prepare_data

        sizes = dict(WARMUP_ROWS={"tool": 24, "place": 4, "direct": 4}, TRAIN_ROWS={"tool": 12, "place": 4}, HELDOUT_ROWS=8)
        for name, value in sizes.items():
            setattr(prepare_data, name, value)
        out = tmp_path_factory.mktemp("quickstart") / "data"
        prepare_data.prepare(out, seed=3)
    finally:
        sys.path.remove(str(RUN_YAML.parent))
    return out


@pytest.fixture
def overrides(small_quickstart, tmp_path):
    """The quickstart's settings on the small data: 4 prompts x 4 rollouts, two updates."""
    data = small_quickstart
    return [
        f"model.path={data}/model",
        f"data.train_files=[{data}/train.parquet]",
        f"sft.files=[{data}/warmup.parquet]",
        f"evaluation.files=[{data}/heldout.parquet]",
        f"evaluation.without_tool_files=[{data}/heldout_direct.parquet]",
        f"output_dir={tmp_path}",
        "name=run",
        "observe.display=log",
        "training.num_steps=2",
        "training.prompts_per_step=4",
        "rollout.group_size=4",
        "rollout.max_num_seqs=16",
        "sft.num_steps=6",
        "sft.rows_per_step=16",
        "checkpoint.every_steps=1",
    ]
