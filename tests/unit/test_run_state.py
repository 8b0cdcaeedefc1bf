"""What a run remembers and how it stops; the processes behind it are tests/integration's."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from megatron_agent.config import RunConfig
from megatron_agent.errors import EngineError, StopRequested
from megatron_agent.run_state import Progress, StopSignal, keep_old_run
from megatron_agent.training.checkpoint import complete_checkpoints, read_state

BOARDS = SimpleNamespace(status=lambda text: None)


async def sleep_long():
    await asyncio.sleep(60)


async def fail():
    await asyncio.sleep(0.01)
    raise EngineError("no engine")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cuts_what_can_be_cut(number):
    async def play():
        stop = StopSignal()
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        with pytest.raises(StopRequested, match="during: rollouts"):
            await stop.or_done(sleep_long(), "rollouts", BOARDS)
        with pytest.raises(StopRequested):  # whatever is asked for next
            await stop.or_done(sleep_long(), "evaluation", BOARDS)

    asyncio.run(play())


def test_work_that_is_done_comes_back_and_a_failure_beside_it_is_raised_at_once():
    async def play():
        stop = StopSignal()
        assert await stop.or_done(asyncio.sleep(0, "result"), "quick", BOARDS) == "result"
        with pytest.raises(EngineError, match="no engine"):
            await stop.or_done(sleep_long(), "warm start", BOARDS, beside=asyncio.ensure_future(fail()))
        done = asyncio.ensure_future(asyncio.sleep(0))
        assert await stop.or_done(asyncio.sleep(0.05, "late"), "beside is done first", BOARDS, beside=done) == "late"

    asyncio.run(play())


class FakeActor:
    """Stands for ranks that would write gigabytes; Progress only asks them to."""

    async def save(self, folder):
        (folder / "weights").write_text("saved")


@pytest.fixture
def parts(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), name="run")
    return SimpleNamespace(config=config, actor=FakeActor(), weight_version=3, data=SimpleNamespace(train=None))


def test_progress_survives_a_checkpoint(parts):
    progress = Progress(before={"heldout": {"accuracy": 0.25}}, seconds_train=1.5)
    progress.finish_step(7, parts, 32)
    asyncio.run(progress.save(parts))
    parts.config.resume = "auto"
    again = Progress.last(parts.config)
    assert (again.step, again.weight_version, again.num_trajectories) == (7, 3, 32)
    assert again.before == {"heldout": {"accuracy": 0.25}} and again.seconds_train == 1.5
    parts.config.resume = "never"
    assert Progress.last(parts.config) is None


def test_a_step_is_saved_once_and_never_when_it_was_cut(parts):
    root = parts.config.folder / "checkpoints"
    progress = Progress(step=2)
    asyncio.run(progress.save(parts))
    (complete_checkpoints(root)[-1] / "weights").write_text("first")
    asyncio.run(progress.save(parts))
    assert (complete_checkpoints(root)[-1] / "weights").read_text() == "first"
    progress.step, progress.is_updating = 3, True  # between the update and its sync
    asyncio.run(progress.save(parts))
    assert [read_state(folder)["step"] for folder in complete_checkpoints(root)] == [2]


def test_an_earlier_run_is_kept(tmp_path):
    folder = tmp_path / "run"
    keep_old_run(folder)  # nothing there
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(content)
        keep_old_run(folder)
    assert [(tmp_path / f"run.{i}" / "metrics.jsonl").read_text() for i in (1, 2)] == ["first", "second"]
    folder.mkdir()
    keep_old_run(folder)  # no run, only a folder
    assert folder.exists()
