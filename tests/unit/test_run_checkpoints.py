"""Checkpoints of a run on the driver: what is waited for, what is raised when, what is kept.

Ranks are stand-ins that write real files (fake_ranks.py); real ones are tests/distributed's, the Hugging Face export of a
real model too.
"""

import asyncio
import json

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_agent.checkpoints import Checkpoints
from megatron_agent.config import CheckpointSection, EvaluationSection, ModelSection, RunConfig, parse
from megatron_agent.errors import CheckpointError, ConfigError, TrainingError
from megatron_agent.training.actor import TrainingConfig
from megatron_agent.training.checkpoint import complete_checkpoints, read_state
from tests.unit.fake_ranks import NUM_RANKS, FakeRanks, write_hf_folder, write_part


def make(tmp_path, **options):
    path = tmp_path / "hf"
    config = RunConfig(
        name="run",
        output_dir=str(tmp_path),
        model=ModelSection(str(path if path.exists() else write_hf_folder(path))),
        training=TrainingConfig(tensor_parallel=NUM_RANKS),
        evaluation=EvaluationSection(["heldout.parquet"]),
        checkpoint=CheckpointSection(**options),
    )
    return Checkpoints(config)


def steps(checkpoints):
    return [read_state(folder)["step"] for folder in complete_checkpoints(checkpoints.root)]


def stored(folder):
    tensor = torch.zeros(NUM_RANKS, 3)
    from torch.distributed.checkpoint import load

    load({"weight": tensor}, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensor


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 5 s")


def test_training_goes_on_while_the_files_are_written(tmp_path):
    async def play():
        checkpoints, ranks = make(tmp_path), FakeRanks()
        ranks.go_on.clear()
        state = {"step": 3, "stream": [1]}
        await checkpoints.save(ranks, state)
        state["stream"].append(2)  # the next step has begun
        await checkpoints.check(ranks)
        assert steps(checkpoints) == []
        ranks.go_on.set()
        await until(lambda: steps(checkpoints) == [3])  # nobody asked
        await checkpoints.finish(ranks)
        folder = checkpoints.root / "step_00000003"
        assert read_state(folder) == {"step": 3, "stream": [1]}
        assert sorted(p.name for p in (folder / "hf").iterdir()) == ["config.json", "hf_layout.json", "tokenizer.json"]
        assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == [".metadata"]

    asyncio.run(play())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_complete_on_return(tmp_path, asynchronous):
    async def play():
        checkpoints, ranks = make(tmp_path, asynchronous=asynchronous), FakeRanks()
        await checkpoints.save(ranks, {"step": 1})
        assert steps(checkpoints) == ([] if asynchronous else [1])
        await checkpoints.save(ranks, {"step": 1}, wait=True)
        assert steps(checkpoints) == [1] and len(ranks.folders) == 1  # it was saved once

    asyncio.run(play())


def test_one_save_at_a_time(tmp_path):
    async def play():
        checkpoints, ranks = make(tmp_path), FakeRanks()
        ranks.go_on.clear()
        await checkpoints.save(ranks, {"step": 1})
        ranks.value = 7
        second = asyncio.ensure_future(checkpoints.save(ranks, {"step": 2}))
        await asyncio.sleep(0.1)
        assert len(ranks.folders) == 1
        ranks.go_on.set()
        await second
        await checkpoints.finish(ranks)
        assert steps(checkpoints) == [1, 2]
        assert [stored(folder)[0, 0].item() for folder in complete_checkpoints(checkpoints.root)] == [0.0, 7.0]

    asyncio.run(play())


@pytest.mark.parametrize("error", [CheckpointError("rank 1: no space left"), TrainingError("trainer rank 1 died")])
def test_a_save_that_fails_is_raised_and_leaves_nothing(tmp_path, error):
    async def play():
        checkpoints, ranks = make(tmp_path), FakeRanks()
        await checkpoints.save(ranks, {"step": 1}, wait=True)
        ranks.error = error
        await checkpoints.save(ranks, {"step": 2})
        with pytest.raises(type(error), match="rank 1"):
            await (checkpoints.check(ranks) if isinstance(error, CheckpointError) else checkpoints.finish(ranks))
        assert [p.name for p in checkpoints.root.iterdir()] == ["step_00000001"]
        ranks.error = None
        await checkpoints.finish(ranks)  # it was raised once

    asyncio.run(play())


def test_shards_that_do_not_make_a_tensor_are_raised_at_the_next_boundary(tmp_path):
    class Forgetful(FakeRanks):
        async def _write(self, folder, value):
            write_part(folder, 0, value)
            write_part(folder, 1, value)
            (folder / ".part_00001").write_bytes((folder / ".part_00000").read_bytes())

    async def play():
        checkpoints, ranks = make(tmp_path), Forgetful()
        await checkpoints.save(ranks, {"step": 1})
        await until(lambda: checkpoints._pending.done())
        with pytest.raises(CheckpointError, match="do not make whole tensors"):
            await checkpoints.check(ranks)
        assert list(checkpoints.root.iterdir()) == []

    asyncio.run(play())


async def evaluated(checkpoints, ranks, step, value):
    """What the loop does after a step with an evaluation."""
    await checkpoints.save(ranks, {"step": step})
    if checkpoints.is_best({"heldout/accuracy": value, "heldout/iou": 0.0}):
        await checkpoints.mark_best(step, {"heldout/accuracy": value})


def test_the_best_is_kept_whatever_is_newer(tmp_path):
    async def play():
        checkpoints, ranks = make(tmp_path, keep=1, keep_best="heldout/accuracy"), FakeRanks()
        for step, value in enumerate([0.2, 0.6, 0.6, 0.4], start=1):  # of equals the first
            await evaluated(checkpoints, ranks, step, value)
        await checkpoints.finish(ranks)
        assert steps(checkpoints) == [2, 4]
        best = json.loads((checkpoints.root / "best.json").read_text())
        assert best == {"step": 2, "folder": "step_00000002", "metric": "heldout/accuracy", "value": 0.6}
        again = make(tmp_path, keep=1, keep_best="heldout/accuracy")  # a run that goes on
        await evaluated(again, ranks, 5, 0.5)
        await evaluated(again, ranks, 6, 0.7)
        await again.save(ranks, {"step": 7}, wait=True)
        assert steps(again) == [6, 7]
        other = make(tmp_path, keep=1, keep_best="heldout/iou")
        assert other.best() == {} and other.is_best({"heldout/iou": 0.0})
        with pytest.raises(ConfigError, match=r"'heldout/iou' is no metric of the evaluation; there are: heldout/accuracy"):
            other.is_best({"heldout/accuracy": 0.5})

    asyncio.run(play())


def test_the_best_is_named_when_it_is_complete(tmp_path):
    async def play():
        checkpoints, ranks = make(tmp_path, keep_best="heldout/accuracy"), FakeRanks()
        ranks.go_on.clear()
        await evaluated(checkpoints, ranks, 1, 0.5)
        assert checkpoints.best() == {} and not checkpoints.is_best({"heldout/accuracy": 0.4})
        ranks.go_on.set()
        await checkpoints.finish(ranks)
        assert checkpoints.best()["step"] == 1

    asyncio.run(play())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": {"keep_best": "accuracy"}}, r"keep_best='accuracy': give a metric of the held-out rows"),
        ({"checkpoint": {"keep_best": "heldout/accuracy"}}, r"needs held-out rows; give evaluation.files"),
        ({"checkpoint": {"keep": -1}}, "0 or more"),
    ],
)
def test_config(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(options)
