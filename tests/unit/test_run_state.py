"""What a run remembers and how it stops; the processes behind it are tests/integration's."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.checkpoints import Checkpoints
from megatron_agent.config import ModelSection, RunConfig
from megatron_agent.errors import AlarmStop, CheckpointError, EngineError, StopRequested, TrainingError
from megatron_agent.observe.alarms import Alarms, AlarmsConfig
from megatron_agent.run_state import Progress, StopSignal, keep_old_run
from megatron_agent.train import end_step
from megatron_agent.training.actor import TrainingConfig
from megatron_agent.training.checkpoint import begin_checkpoint, complete_checkpoints, finish_checkpoint, read_state
from tests.unit.fake_ranks import NUM_RANKS, FakeRanks, write_hf_folder

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


class Controlled(Algorithm):
    """An algorithm that learns a coefficient of its own."""

    coefficient = 0.1

    def advantages(self, samples):
        raise NotImplementedError

    def loss(self, inputs):
        raise NotImplementedError

    def state(self):
        return {"coefficient": self.coefficient}

    def load_state(self, state):
        self.coefficient = state["coefficient"]


def make_parts(tmp_path, ranks):
    path = tmp_path / "hf"
    config = RunConfig(
        output_dir=str(tmp_path),
        name="run",
        algorithm_name="controlled",
        model=ModelSection(str(path if path.exists() else write_hf_folder(path))),
        training=TrainingConfig(tensor_parallel=NUM_RANKS),
    )
    data = SimpleNamespace(train=None)
    checkpoints = Checkpoints(config)
    return SimpleNamespace(
        config=config,
        actor=ranks,
        learner=ranks,
        weight_version=3,
        weights=SimpleNamespace(version=3),
        data=data,
        algorithm=Controlled(),
        checkpoints=checkpoints,
        alarms=Alarms(config.observe.alarms, config.training.logprob_gap_alarm),
    )


def test_progress_survives_a_checkpoint(tmp_path):
    async def play():
        ranks = FakeRanks()
        parts = make_parts(tmp_path, ranks)
        parts.algorithm.coefficient = 0.7
        progress = Progress(before={"heldout": {"accuracy": 0.25}}, seconds_train=1.5)
        progress.finish_step(7, parts, 32)
        parts.alarms.check(7, {"entropy": 0.5})
        progress.alarms = parts.alarms.state()
        parts.algorithm.coefficient = 0.9  # the next step has begun
        await progress.save(parts, wait=True)
        parts.config.resume = "auto"
        again = Progress.last(parts.config)
        assert (again.step, again.weight_version, again.num_trajectories) == (7, 3, 32)
        assert again.before == {"heldout": {"accuracy": 0.25}} and again.seconds_train == 1.5
        new, loaded = make_parts(tmp_path, ranks), []

        async def load(folder):
            loaded.append(folder.name)

        ranks.load = load
        await again.restore(new)
        assert loaded == ["step_00000007"] and new.algorithm.coefficient == 0.7
        assert new.alarms.state()["history"]["entropy"] == [0.5]
        parts.config.resume = "never"
        assert Progress.last(parts.config) is None

    asyncio.run(play())


def test_a_state_of_another_version_is_an_error(tmp_path):
    parts = make_parts(tmp_path, None)
    parts.config.resume = "auto"
    begin_checkpoint(parts.checkpoints.root, 4)
    finish_checkpoint(parts.checkpoints.root, 4, {"step": 4, "moon_phase": 0.5})
    with pytest.raises(CheckpointError, match=r"step_00000004/state\.json: not what this version writes: .*moon_phase"):
        Progress.last(parts.config)


def test_a_step_is_saved_once_and_never_when_it_was_cut(tmp_path):
    async def play():
        ranks = FakeRanks()
        parts = make_parts(tmp_path, ranks)
        progress = Progress(step=2)
        await progress.save(parts, wait=True)
        await progress.save(parts, wait=True)
        new = make_parts(tmp_path, ranks)  # after a restart
        await progress.save(new, wait=True)
        assert len(ranks.folders) == 1
        progress.step, progress.is_updating = 3, True  # between the update and its sync
        await progress.save(new, wait=True)
        assert [read_state(folder)["step"] for folder in complete_checkpoints(new.checkpoints.root)] == [2]

    asyncio.run(play())


def test_a_stop_waits_for_the_save_under_way(tmp_path):
    async def play():
        ranks = FakeRanks()
        parts, progress = make_parts(tmp_path, ranks), Progress(step=2)
        ranks.go_on.clear()
        await progress.save(parts)
        asyncio.get_running_loop().call_later(0.1, ranks.go_on.set)
        progress.is_updating = True
        await progress.save(parts, wait=True)
        assert [folder.name for folder in complete_checkpoints(parts.checkpoints.root)] == ["step_00000002"]

    asyncio.run(play())


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
    (folder / "ahead").mkdir()  # of one that was stopped before its first number
    keep_old_run(folder)
    assert (tmp_path / "run.3" / "ahead").is_dir() and not folder.exists()


def test_an_alarm_is_said_and_may_stop_the_run(tmp_path):
    """Numbers that are not finite end it without a checkpoint of them; others after one (train.train saves it)."""
    notes = []
    boards = SimpleNamespace(note=notes.append)

    def ends(metrics, **actions):
        parts, progress = make_parts(tmp_path, FakeRanks()), Progress(step=3)
        parts.config.checkpoint.every_steps = 0
        parts.alarms = Alarms(AlarmsConfig(actions=actions), 0.05)
        asyncio.run(end_step(parts, progress, metrics, boards))
        return progress

    progress = ends({"loss": 0.5, "repeated_fraction": 0.9})
    assert notes and notes[0].startswith("ALARM step 3: repetition: 90.0% of") and progress.alarms["said"] == {"repetition": 3}
    with pytest.raises(AlarmStop, match=r"step 3: repetition: .*observe\.alarms\.actions\.repetition=stop"):
        ends({"loss": 0.5, "repeated_fraction": 0.9}, repetition="stop")
    with pytest.raises(TrainingError, match="not_finite: loss=nan"):
        ends({"loss": float("nan")})


def test_a_signal_that_came_before_stops_work_that_would_not_wait():
    async def ready():
        return 1

    async def main():
        stop = StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        with pytest.raises(StopRequested, match="before: the next step"):
            await stop.or_done(ready(), "the next step", BOARDS)

    asyncio.run(main())
