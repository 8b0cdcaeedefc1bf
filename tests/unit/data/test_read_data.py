"""stages.read_data: a configuration's files become the stream of training tasks and the held-out ones."""

import json

import pytest
from test_reading import json_row, published_row, write_jsonl, write_parquet

from megatron_agent import registry, stages
from megatron_agent.config import parse
from megatron_agent.data.stream import TaskMix, TaskStream
from megatron_agent.errors import DataError


@pytest.fixture
def files(tmp_path):
    easy = write_parquet(tmp_path / "easy.parquet", [published_row(i) for i in range(6)])
    long = json_row(9)
    long["prompt"][1]["content"] = "<image> " + "what color is it ? " * 80
    hard = write_jsonl(tmp_path / "hard.jsonl", [*(json_row(i) for i in range(4)), long])
    return str(easy), str(hard)


def read(tmp_path, model, data, **sections):
    base = {"output_dir": str(tmp_path), "model": {"path": str(model)}, "rollout": {"max_model_len": 256}, "agent": {
        "single_response_max_tokens": 32}, "training": {"num_steps": 1, "prompts_per_step": 4}}  # fmt: skip
    config = parse({**base, "data": data, **sections})
    family = registry.resolve("models", "qwen2_5_vl")(model)
    return stages.read_data(config, family, stages.image_store(config))


def test_a_mix_of_kinds(tmp_path, files, tiny_models):
    mix = [{"files": [files[0]], "weight": 3}, {"files": [files[1]]}]
    data = read(tmp_path, tiny_models["tied"], {"mix": mix}, evaluation={"files": [files[1]], "max_rows": 2})
    assert isinstance(data.train, TaskMix) and len(data.heldout) == 2
    drawn = [task.task_id for task in data.train.next(16)]
    assert sum(name.startswith("easy:") for name in drawn) == 12 and "hard:4" not in drawn  # 400 words: no room to answer
    state = json.loads(json.dumps(data.train.state()))
    again = read(tmp_path, tiny_models["tied"], {"mix": mix})
    again.train.load_state(state)
    assert again.train.next(20) == data.train.next(20)
    shorter = read(tmp_path, tiny_models["tied"], {"mix": mix}, rollout={"max_model_len": 1024})
    with pytest.raises(DataError, match="fingerprint"):  # now the long prompt fits: another set of tasks
        shorter.train.load_state(state)


def test_plain_files_and_none(tmp_path, files, tiny_models):
    data = read(tmp_path, tiny_models["tied"], {"train_files": list(files), "image_dir": str(tmp_path / "pictures")})
    assert isinstance(data.train, TaskStream) and len({task.task_id for task in data.train.next(10)}) == 10
    assert (tmp_path / "pictures/sizes.json").is_file()
    with pytest.raises(DataError, match="data.train_files is empty"):
        read(tmp_path, tiny_models["tied"], {})
