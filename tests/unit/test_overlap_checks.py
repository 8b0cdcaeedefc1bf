"""What the overlapped loop asks of a configuration, and the file in which a loop keeps its queue; the rest is in
tests/integration/test_train_async.py."""

import asyncio
import logging
from types import SimpleNamespace

import pytest

from megatron_agent.config import parse
from megatron_agent.errors import CheckpointError, ConfigError, StopRequested
from megatron_agent.queue_file import QueueFile
from megatron_agent.rollout.ahead import Snapshot, Start
from megatron_agent.rollout.collect import Unfinished
from megatron_agent.run_state import Progress
from megatron_agent.train import steps_in_turn
from megatron_agent.train_async import check_overlap
from megatron_agent.types import Task, Trajectory, TrajectoryGroup

TRUNCATED = {"name": "grpo", "importance": {"correction": "truncate"}}


def test_oversampling_is_of_the_other_loop():
    with pytest.raises(ConfigError, match=r"rollout\.oversample=0\.5 is of the synchronous loop.*max_staleness=1"):
        check_overlap(parse({"rollout": {"oversample": 0.5}}))
    with pytest.raises(ConfigError, match="max_staleness=-1 must be 0 or more"):
        parse({"training": {"max_staleness": -1}})


@pytest.mark.parametrize(("bound", "algorithm", "warns"), [(1, "grpo", True), (0, "grpo", False), (4, TRUNCATED, False)])
def test_stale_tokens_without_a_correction_are_warned_of(caplog, bound, algorithm, warns):
    with caplog.at_level(logging.WARNING, "megatron_agent"):
        check_overlap(parse({"training": {"max_staleness": bound}, "algorithm": algorithm}))
    assert ("trained on as if the current ones had sampled them" in caplog.text) == warns


def test_the_queue_is_kept_by_step_and_a_damaged_file_is_refused(tmp_path):
    stream = SimpleNamespace(loaded=None)
    stream.load_state = lambda state: setattr(stream, "loaded", state)
    parts = SimpleNamespace(config=SimpleNamespace(folder=tmp_path), data=SimpleNamespace(train=stream))
    task = Task("a", "", (), (), "", "", "")
    file = QueueFile(parts)
    snapshot = Snapshot(
        3, 9, [(Start(2, 4), TrajectoryGroup(task, [Trajectory(task, 0, [1])]))], [(Start(3, 5), Unfinished(task))]
    )
    file.save(snapshot, {"position": 7})
    assert file.load(2) is None  # a checkpoint of a run that kept none
    assert file.load(3) == snapshot and stream.loaded == {"position": 7}
    path = tmp_path / "ahead" / "step_00000003"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"step_00000003: damaged; remove it"):
        file.load(3)


def test_a_queue_that_cannot_be_written_leaves_the_disk_and_the_last_file_alone(tmp_path, monkeypatch, caplog):
    parts = SimpleNamespace(config=SimpleNamespace(folder=tmp_path), data=SimpleNamespace(train=None))
    file = QueueFile(parts)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_agent.queue_file.os.fsync", full)
    with caplog.at_level(logging.ERROR, "megatron_agent"):
        file.try_to_save(Snapshot(3, 9, [], []), {})
    assert "could not be kept" in caplog.text and list((tmp_path / "ahead").iterdir()) == []


def test_what_the_overlapped_loop_left_is_not_drawn_again_after_a_stop_in_turns(tmp_path):
    """The queue's stream is ahead of the checkpoint's: a stop before the first step keeps the queue's."""
    config = parse({"rollout": {"oversample": 0.5, "carry_over": True}, "training": {"num_steps": 4}, "name": "run"})
    config.output_dir = str(tmp_path)
    stream, task, gone_on = SimpleNamespace(position=0), Task("a", "", (), (), "", "", ""), []
    stream.state = lambda: {"position": stream.position}
    stream.load_state = lambda state: setattr(stream, "position", state["position"])

    async def or_done(work, *rest):
        work.close()
        raise StopRequested("asked to")

    async def sample_groups(step):
        return [], []

    rollouts = SimpleNamespace(go_on=lambda group, step: gone_on.append(step) or len(gone_on))
    parts = SimpleNamespace(config=config, data=SimpleNamespace(train=stream), rollouts=rollouts, sample_groups=sample_groups)
    done = TrajectoryGroup(task, [Trajectory(task, 0, [1])])
    QueueFile(parts).save(Snapshot(2, 9, [(Start(1, 3), done)], [(Start(2, 4), Unfinished(task))]), {"position": 9})
    progress = Progress(step=2, stream={"position": 6})
    with pytest.raises(StopRequested):
        asyncio.run(steps_in_turn(parts, progress, None, SimpleNamespace(or_done=or_done)))
    stream.position = 0
    kept = QueueFile(parts).load(2)
    assert stream.position == 9 and sorted(gone_on) == [3, 4] and len(kept.finished) + len(kept.unfinished) == 2


def test_what_the_synchronous_loop_carries_over_survives_a_stop(tmp_path, monkeypatch):
    """As it was at the end of the last finished step, with that step's order of the data; each group with the step in which
    it began, for its seeds and its tokens' age."""
    config = parse({"rollout": {"oversample": 0.5, "carry_over": True}, "training": {"num_steps": 4}, "name": "run"})
    config.output_dir = str(tmp_path)
    gone_on, task = [], Task("slow", "", (), (), "", "", "")
    left = {7: Unfinished(task, [Trajectory(task, 1, [1])])}
    later = Unfinished(task, [Trajectory(task, 2, [1])])

    def go_on(group, step):
        gone_on.append((group, step))
        return 50 + len(gone_on)

    stream = SimpleNamespace(position=0)
    stream.state = lambda: {"position": stream.position}
    stream.load_state = lambda state: setattr(stream, "position", state["position"])
    rollouts = SimpleNamespace(unfinished=lambda: left, go_on=go_on)

    async def sample_groups(step):
        stream.position += 1
        if step == 2:
            left[8] = later
        if step == 3 and not gone_on:
            raise StopRequested("asked to")
        return [], []

    async def learn(parts, progress, step, *rest):
        progress.step, progress.stream = step, {"position": stream.position}
        return {}

    async def nothing(*arguments):
        pass

    async def or_done(work, *rest):
        return await work

    for name, replacement in (("learn", learn), ("end_step", nothing), ("evaluate_between", nothing)):
        monkeypatch.setattr(f"megatron_agent.train.{name}", replacement)
    data, stop = SimpleNamespace(train=stream), SimpleNamespace(or_done=or_done)
    parts = SimpleNamespace(config=config, data=data, rollouts=rollouts, sample_groups=sample_groups)
    progress = Progress()
    with pytest.raises(StopRequested):
        asyncio.run(steps_in_turn(parts, progress, None, stop))
    assert (progress.step, stream.position, gone_on) == (2, 3, [])
    rollouts.unfinished = lambda: {51: left[7], 52: later, 60: left[7]}
    asyncio.run(steps_in_turn(parts, progress, None, stop))
    assert gone_on == [(left[7], 1), (later, 2)] and (progress.step, stream.position) == (4, 4)
    kept = QueueFile(parts).load(4)
    assert [start for start, _ in kept.unfinished] == [Start(0, 1), Start(1, 2), Start(2, 3)]
