"""What the overlapped loop asks of a configuration, and the file in which it keeps its queue; the rest is in
tests/integration/test_train_async.py."""

import logging
from types import SimpleNamespace

import pytest

from megatron_agent.config import parse
from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.rollout.ahead import RolloutsAhead, Snapshot, Start
from megatron_agent.train_async import QueueFile, check_overlap
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
    stream = SimpleNamespace(state=lambda: {"position": 7}, loaded=None)
    stream.load_state = lambda state: setattr(stream, "loaded", state)
    parts = SimpleNamespace(config=SimpleNamespace(folder=tmp_path), data=SimpleNamespace(train=stream))
    rollouts = SimpleNamespace(unfinished=dict, start=None, go_on=None, next_group=None)

    def queue():
        return RolloutsAhead(rollouts, lambda count: [], lambda group: True, 2, 1, 10, updates=3)

    task = Task("a", "", (), (), "", "", "")
    ahead, file = queue(), QueueFile(parts)
    ahead.restore(Snapshot(3, 9, [(Start(2, 4), TrajectoryGroup(task, [Trajectory(task, 0, [1])]))], []))
    file.save(ahead, 4)  # of another step: the update of step 4 was cut
    assert list(tmp_path.iterdir()) == []
    file.save(ahead, 3)
    again = queue()
    file.load(again, 2)
    assert again.num_finished == 0  # no file of that step: a checkpoint of the synchronous loop
    file.load(again, 3)
    assert again.num_finished == 1 and again.snapshot() == ahead.snapshot() and stream.loaded == {"position": 7}
    path = tmp_path / "ahead" / "step_00000003"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"step_00000003: damaged; remove it"):
        file.load(queue(), 3)
