"""The examples at published sizes: their layouts fit the models, their weight transfer is planned, and their data path runs
with tiny models and data of the same columns.

Not covered: anything computed at these sizes; judges and retrievers that they name (tests of rewards and envs).
"""

import dataclasses
import shutil
from math import prod
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import tiny_text
from examples.rag import prepare_data as rag
from megatron_agent import registry, stages
from megatron_agent.config import load
from megatron_agent.errors import ConfigError
from megatron_agent.sync import transfer_plan
from tests.integration.conftest import small_quickstart  # noqa: F401 (a fixture)
from tests.unit.test_example_data import SIZES

ROOT = Path(__file__).parents[2]
TEXT = sorted(path.stem for path in (ROOT / "examples" / "rag").glob("qwen2_5_*.yaml"))
PICTURES = sorted(path.stem for path in (ROOT / "examples" / "deepeyes").glob("*.yaml"))
SOURCES = {"vstar": "vl_agent", "chart": "vl_agent", "thinklite_eureka": "math", "xince": "math", "other": "vl_agent"}
DEGREES = ("tensor_parallel", "pipeline_parallel", "data_parallel", "context_parallel", "virtual_pipeline")
PUBLISHED = {
    "qwen2_5_7b": 7_615_616_512, "qwen2_5_32b": 32_763_876_352, "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656, "qwen2_5_vl_32b": 33_452_718_336, "qwen2_5_vl_72b": 73_410_777_344,
}  # parameters  # fmt: skip
TINY_LAYOUT = [f"training.{degree}=1" for degree in DEGREES] + ["training.sequence_parallel=false"]
TINY_LAYOUT += ["rollout.tensor_parallel=1", "rollout.num_engines=1", "evaluation.files=[]", "checkpoint.keep_best=''"]


def yaml_of(name):
    return ROOT / "examples" / ("deepeyes" if name in PICTURES else "rag") / f"{name}.yaml"


@pytest.mark.parametrize("name", [*TEXT, *PICTURES])
def test_layouts_fit_the_published_sizes(name, tmp_path):
    size = name.removesuffix("_grpo").removesuffix("_ppo")
    shutil.copy(ROOT / "tests" / "data" / f"{size}.json", tmp_path / "config.json")
    config = load(yaml_of(name), [f"model.path={tmp_path}"])
    family = registry.resolve("models", config.model.family)(tmp_path)
    config.training.layout = family.balanced(config.training.layout)
    family.check(config.training.layout, config.rollout.tensor_parallel)
    shapes = {entry.hf_name: entry.shape for entry in family.table(config.training.layout, False)}
    assert sum(map(prod, shapes.values())) == PUBLISHED[size]
    plan = transfer_plan(config, family)
    assert plan.replicas == config.rollout.num_engines
    per_engine = sum(plan.pair_bytes.values()) / plan.replicas / 2 / PUBLISHED[size]  # bf16
    assert per_engine == 1 if config.rollout.tensor_parallel == 1 else 1 < per_engine < 1.001  # norms go to every rank
    gpus = config.training.layout.world_size, config.rollout.num_engines * config.rollout.tensor_parallel
    first = yaml_of(name).read_text().splitlines()[0]
    assert f"{gpus[0]} GPUs train, {gpus[1]} generate" in first
    with pytest.raises(ConfigError, match="does not divide the model's attention heads"):
        family.check(load(yaml_of(name), ["training.tensor_parallel=3"]).training.layout)


def test_there_is_ppo_and_grpo_for_both_sizes():
    names = [f"qwen2_5_{size}_{algorithm}" for size in ("32b", "7b") for algorithm in ("grpo", "ppo")]
    assert names == TEXT
    for name in TEXT:
        config = load(yaml_of(name))
        algorithm = registry.resolve("algorithms", config.algorithm_name)(config.algorithm)
        assert algorithm.needs_critic == name.endswith("ppo") and algorithm.needs_reference


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """Questions for both protocols of retrieval, and a tiny Qwen2."""
    folder = tmp_path_factory.mktemp("rag") / "seed3"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in SIZES["rag"].items():
            patch.setattr(rag, key, value)
        tiny_text.prepare(folder, 3, [], rag.write_all)
    table = pq.read_table(folder / "train.parquet")
    names = pa.array(["rag"] * (table.num_rows // 2) + ["rag_v2"] * (table.num_rows - table.num_rows // 2))
    column = table.schema.get_field_index("env_name")
    pq.write_table(table.set_column(column, "env_name", names), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("name", [*TEXT, *PICTURES])
def test_the_data_path_with_a_tiny_model(name, request, tmp_path):
    """Rows are read, prompts measured and drawn, reward and algorithm are built."""
    folder = request.getfixturevalue("searches" if name in TEXT else "small_quickstart")
    overrides = [*TINY_LAYOUT, f"model.path={folder}/model", f"data.train_files=[{folder}/train.parquet]",
                 f"output_dir={tmp_path}"]  # fmt: skip
    config = load(yaml_of(name), overrides)
    family = stages.check(config)
    data = stages.read_data(config, family, stages.image_store(config))
    assert data.reports["train"].num_bad == 0
    tasks = data.train.next(4)
    renderer = family.renderer(config.model.path)
    for task in tasks:
        assert task.env_name in config.env and len(renderer.prompt(task.messages, task.images)) < config.rollout.max_model_len
        assert bool(task.images) == (name in PICTURES)
    if name in TEXT:
        assert data.reports["train"].by_env.keys() == config.env.keys() == {"rag", "rag_v2"}
    reward = registry.resolve("rewards", config.reward_name)(config.reward)
    algorithm = registry.resolve("algorithms", config.algorithm_name)(config.algorithm)
    assert type(reward).__module__.endswith("by_source" if name in PICTURES else "rag")
    assert type(algorithm).__module__.endswith("ppo" if name.endswith("_ppo") else "grpo")
    if name in PICTURES:
        by_source = {source: reward.reward_of(dataclasses.replace(tasks[0], data_source=source)) for source in SOURCES}
        assert {source: type(one).__module__.rpartition(".")[2] for source, one in by_source.items()} == SOURCES


@pytest.mark.parametrize("name", PICTURES)
def test_the_published_hyperparameters(name):
    config = load(yaml_of(name))
    agent, rollout, training = config.agent, config.rollout, config.training
    assert (training.prompts_per_step, rollout.group_size, training.lr) == (256, 16, 1e-6)
    assert (config.data.max_prompt_tokens, rollout.max_model_len) == (8192, 8192 + 20480)
    assert (agent.max_turns, agent.single_response_max_tokens) == (20, 10240)
    assert training.num_steps == 32 * 47_000 // training.prompts_per_step and config.checkpoint.every_steps == 8
    assert (config.algorithm_name, config.algorithm.kl.coefficient, config.algorithm.entropy_coefficient) == ("grpo", 0, 0)
    assert rollout.tensor_parallel == 4 or name != "qwen2_5_vl_32b"


def test_deepeyes_sources_go_to_the_rewards_of_the_paper():
    for name in PICTURES:
        config = load(yaml_of(name)).reward
        routed = {source: route["name"] for source, route in config.routes.items()}
        assert routed == {"vstar": "vl_agent", "chart": "vl_agent", "thinklite*": "math", "xince": "math"}
        assert all(route["judge"]["kind"] == "openai" for route in config.routes.values()) and config.judge.min_accuracy == 0.9
