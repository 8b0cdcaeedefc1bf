"""Concurrency, order and failure of a collection, and the numbers of its metrics."""

import asyncio

import pytest

from megatron_agent.rollout.collect import Collection, collect, ends_in_loop, rollout_metrics, trajectory_seed, weigh_end
from megatron_agent.types import LossUse, RewardParts, Status, Task, ToolCall, Trajectory, TrajectoryGroup, Turn, Unscored


def task(name, env_name="", **extra_info):
    return Task(name, "unit", (), (), env_name, "", "", extra_info)


def turn(num_tokens, call=None):
    return Turn([1] * num_tokens, [0.0] * num_tokens, [0] * num_tokens, "", "stop", tool_calls=[call] if call else [])


class SampleIndexReward:
    """Accuracy 1 for even samples; sample 3 cannot be judged."""

    async def score(self, trajectory, task):
        await asyncio.sleep(0)
        if trajectory.sample_index == 3:
            return Unscored("judge away")
        return RewardParts({"accuracy": float(trajectory.sample_index % 2 == 0)}, {"accuracy": 0.8})


def test_groups_keep_order_and_no_one_waits_for_the_slowest():
    started, finished, running = [], [], set()
    most = 0

    async def run_one(item, index):
        nonlocal most
        name = (item.task_id, index)
        started.append(name)
        running.add(name)
        most = max(most, len(running))
        await asyncio.sleep(0.05 if name == ("a", 0) else 0.001)
        running.discard(name)
        finished.append(name)
        return Trajectory(item, index, [])

    groups = asyncio.run(collect([task("a"), task("b")], 4, run_one, SampleIndexReward(), max_in_flight=3))
    names = [("a", i) for i in range(4)] + [("b", i) for i in range(4)]
    assert [(t.task.task_id, t.sample_index) for group in groups for t in group.trajectories] == names
    assert started == names
    assert finished[-1] == ("a", 0)  # the other group was through before
    assert most == 3
    assert isinstance(groups[1].trajectories[3].reward, Unscored)


def test_a_failure_stops_the_other_episodes():
    cancelled = []

    async def run_one(item, index):
        if index == 1:
            raise ValueError("broken episode")
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    with pytest.raises(ValueError, match="broken episode"):
        asyncio.run(collect([task("a")], 3, run_one, SampleIndexReward(), max_in_flight=2))
    assert cancelled[0] == 0  # sample 2 may just have taken the place of the one that failed


def test_groups_are_handed_over_as_they_finish_and_others_can_be_started_meanwhile():
    async def main():
        gates, cancelled = {name: asyncio.Event() for name in "abcd"}, []

        async def run_one(item, index):
            try:
                await gates[item.task_id].wait()
            except asyncio.CancelledError:
                cancelled.append((item.task_id, index))
                raise
            return Trajectory(item, index, [])

        collection = Collection(SampleIndexReward(), max_in_flight=100)
        collection.start([task("a"), task("b")], 2, run_one)
        gates["b"].set()
        number, group = await collection.next()
        assert (number, group.task.task_id, [t.sample_index for t in group.trajectories]) == (1, "b", [0, 1])
        collection.start([task("c"), task("d")], 1, run_one)
        gates["a"].set()
        gates["d"].set()
        assert sorted([(await collection.next())[0] for _ in range(2)]) == [0, 3]
        assert len(collection) == 1 and not cancelled
        await collection.cancel()
        assert len(collection) == 0 and cancelled == [("c", 0)]

    asyncio.run(main())


def test_ends_are_typed_and_weigh():
    async def run_one(item, index):
        status = {1: Status.ENGINE_LOST, 2: Status.LENGTH, 4: Status.ABORTED}.get(index, Status.ANSWERED)
        return Trajectory(item, index, [], [turn(2)], status)

    (group,) = asyncio.run(collect([task("a")], 4, run_one, SampleIndexReward(), max_in_flight=9))
    statuses = [t.status for t in group.trajectories]
    assert statuses == [Status.ANSWERED, Status.ENGINE_LOST, Status.LENGTH, Status.UNSCORED]
    assert [isinstance(t.reward, Unscored) for t in group.trajectories] == [False, True, False, True]
    for trajectory in group.trajectories:
        weigh_end(trajectory, LossUse.PENALISE, 0.5)
    assert group.trajectories[2].reward.total == pytest.approx(0.8 - 0.5)
    assert group.trajectories[2].reward.parts == {"accuracy": 1.0, "status_penalty": -0.5}
    assert isinstance(group.trajectories[3].reward, Unscored)
    metrics = rollout_metrics([group])
    assert metrics["status/engine_lost"] == metrics["status/unscored"] == metrics["status/length"] == 0.25


def test_seeds_are_stable_and_differ():
    assert trajectory_seed(0, 1, "a", 2) == trajectory_seed(0, 1, "a", 2) == 1886011010
    seeds = {trajectory_seed(run, step, name, i) for run in (0, 1) for step in (0, 1) for name in "ab" for i in range(8)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_metrics():
    zoom = task("a", "tool", target_bbox=[0, 0, 10, 10])
    hit = ToolCall("zoom", True, seconds=0.1, box_px=(0, 0, 10, 5))
    better = ToolCall("zoom", True, seconds=0.3, box_px=(0, 0, 10, 8))
    broken = ToolCall("zoom", False, "bad box", 0.2, box_px=(0, 0, 10, 10))
    half = RewardParts({"accuracy": 1.0, "tool": 1.0}, {"accuracy": 0.8, "tool": 1.2})
    zero = RewardParts({"accuracy": 0.0, "tool": 0.0}, {"accuracy": 0.8, "tool": 1.2})
    trajectories = [
        Trajectory(zoom, 0, [], [turn(4, hit), turn(2, better), turn(2)], Status.ANSWERED, half),
        Trajectory(zoom, 1, [], [turn(4, broken)], Status.MAX_TURNS, zero),
        Trajectory(zoom, 2, [], [turn(4)], Status.ANSWERED, Unscored("judge away")),
        Trajectory(task("b"), 0, [], [turn(4)], Status.ANSWERED, zero),
    ]
    metrics = rollout_metrics(
        [TrajectoryGroup(zoom, trajectories[:3]), TrajectoryGroup(trajectories[3].task, trajectories[3:])]
    )
    assert metrics["reward"] == pytest.approx(2 / 3)
    assert metrics["reward_std"] == pytest.approx((2 * (2 / 3) ** 2 + (4 / 3) ** 2) ** 0.5 / 3**0.5)
    assert metrics["accuracy"] == metrics["reward/tool"] == pytest.approx(1 / 3)
    assert metrics["unscored"] == 0.25
    assert metrics["tool_rate"] == pytest.approx(1 / 3)
    assert metrics["tool/calls"] == 1.0
    assert metrics["tool/errors"] == 1.0
    assert metrics["tool/seconds"] == pytest.approx(0.2)
    assert metrics["iou"] == pytest.approx(0.8 / 3)
    assert (metrics["response_tokens"], metrics["response_turns"]) == (5.0, 1.5)
    assert (metrics["status/answered"], metrics["status/max_turns"], metrics["status/aborted"]) == (0.75, 0.25, 0.0)
    assert rollout_metrics([]) == {}


def test_an_episode_without_room_for_a_turn_counts():
    full = Trajectory(task("a", "tool", target_bbox=[0, 0, 9, 9]), 0, [1, 2], [], Status.CONTEXT_FULL, Unscored("no turn"))
    metrics = rollout_metrics([TrajectoryGroup(full.task, [full])])
    assert (metrics["status/context_full"], metrics["response_tokens"], metrics["response_turns"]) == (1.0, 0.0, 0.0)
    assert (metrics["unscored"], metrics["iou"], metrics["tool/calls"]) == (1.0, 0.0, 0.0)


def test_accuracy_of_every_source_where_there_are_several():
    def of(source, accuracy):
        item = Task("a", source, (), (), "", "", "")
        scored = Unscored("judge away") if accuracy is None else RewardParts({"accuracy": accuracy}, {"accuracy": 1.0})
        return TrajectoryGroup(item, [Trajectory(item, 0, [], [turn(1)], Status.ANSWERED, scored)])

    metrics = rollout_metrics([of("vstar", 1.0), of("vstar", 0.0), of("chart", 1.0), of("chart", None), of("broken", None)])
    assert {name: value for name, value in metrics.items() if name.startswith("source/")} == {
        "source/vstar/accuracy": 0.5, "source/chart/accuracy": 1.0,
    }  # fmt: skip
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert not [name for name in rollout_metrics([of("vstar", 1.0), of("vstar", 0.0)]) if name.startswith("source/")]


def test_loops_at_the_end_of_a_trajectory():
    def ends_so(*token_ids):
        spoken = Turn(list(token_ids), [0.0] * len(token_ids), [0] * len(token_ids), "", "stop")
        return ends_in_loop(Trajectory(task("a"), 0, [], [turn(40), spoken]))

    assert ends_so(*range(50), *[7] * 32) and ends_so(*[1, 2, 3] * 20)
    assert not ends_so(*range(50), *[7] * 31) and not ends_so(*[7] * 20) and not ends_so(*range(9), *range(9), *range(9))
    assert not ends_so(*list(range(9)) * 5)  # nine tokens are no stutter
    assert not ends_in_loop(Trajectory(task("a"), 0, []))


def test_groups_whose_rewards_are_all_alike():
    def group(*rewards):
        parts = [Unscored("away") if r is None else RewardParts({"x": r}, {"x": 1.0}) for r in rewards]
        return TrajectoryGroup(task("a"), [Trajectory(task("a"), i, [], reward=r) for i, r in enumerate(parts)])

    groups = [group(1, 1, None), group(0, 1), group(0, 0, 0), group(0.5, 0.25), group(1, None)]
    assert rollout_metrics(groups)["degenerate_groups"] == 0.5
    assert "degenerate_groups" not in rollout_metrics([group(1)])
