"""The queue of rollouts that run ahead: its bound on staleness, its back-pressure, and what it keeps over a restart.

Groups take random times on a clock of their own (no sleeping), so that every order of ends is met.
"""

import asyncio
import random
from collections import Counter

import pytest

from megatron_agent.rollout.ahead import RolloutsAhead, from_bytes, to_bytes
from megatron_agent.rollout.collect import Unfinished
from megatron_agent.types import Task, Trajectory, TrajectoryGroup


class Source:
    """Groups whose ends `let_one_end` decides; counts what was started, and for which step."""

    def __init__(self, seed=0):
        self.random, self.gates, self.tasks, self.steps, self.numbers = random.Random(seed), {}, {}, {}, iter(range(10**6))
        self.ended, self.drawn = asyncio.Queue(), 0

    def draw(self, count):
        self.drawn += count
        return [Task(str(i), "", (), (), "", "", "") for i in range(self.drawn - count, self.drawn)]

    def start(self, tasks, step):
        return [self.go_on(Unfinished(task), step) for task in tasks]

    def go_on(self, unfinished, step):
        number = next(self.numbers)
        self.tasks[number], self.steps[unfinished.task.task_id] = unfinished, step
        return number

    def unfinished(self):
        return dict(self.tasks)

    async def next_group(self):
        number = await self.ended.get()
        task = self.tasks.pop(number).task
        return number, TrajectoryGroup(task, [Trajectory(task, 0, [1])])

    def let_end(self, count):
        waiting = [n for n in self.tasks if n not in self.ended._queue]
        for number in self.random.sample(waiting, min(count, len(waiting))):
            self.ended.put_nowait(number)


def queue(source, staleness, steps=12, groups=3, keep=lambda group: True, **more):
    return RolloutsAhead(source, source.draw, keep, groups, staleness, steps, **more)


async def taken(ahead, source):
    """`take`, while one group after another ends at random."""
    take = asyncio.ensure_future(ahead.take())
    for _ in range(1000):
        for _ in range(5):
            await asyncio.sleep(0)
        if take.done():
            return take.result()
        source.let_end(1)
    raise AssertionError("the step does not fill")


def names(groups):
    return [group.task.task_id for group in groups]


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_no_group_is_older_than_allowed_lost_or_trained_twice(staleness, seed):
    async def main():
        source = Source(seed)
        ahead, trained, started = queue(source, staleness), [], {}
        for step in range(12):
            groups, _ = await taken(ahead, source)
            for number, start in ahead._started.items():
                started.setdefault(number, start)
            assert len(groups) == 3 and ahead.num_under_way + ahead.num_finished + 3 <= 3 * (staleness + 1)
            ages = [step - ahead._started[number].updates for number in ahead._taken]
            assert max(ages) <= staleness, (step, ages)
            trained += names(groups)
            source.let_end(source.random.randrange(4))  # some end during the update
            ahead.commit()
        assert Counter(trained) == Counter(str(i) for i in range(36)) and source.drawn == 36
        assert all(source.steps[str(i)] == i // 3 + 1 for i in range(36))  # seeds do not depend on when a group ended

    asyncio.run(main())


def test_staleness_0_is_the_synchronous_loop():
    async def main():
        source = Source()
        ahead = queue(source, 0)
        for step in range(4):
            groups, _ = await taken(ahead, source)
            assert names(groups) == [str(3 * step + i) for i in range(3)] and ahead.num_under_way == 0
            ahead.commit()

    asyncio.run(main())


def test_the_trainer_does_not_wait_for_the_slowest():
    async def main():
        source = Source()
        ahead = queue(source, 1)
        take = asyncio.ensure_future(ahead.take())
        await asyncio.sleep(0)
        assert ahead.num_under_way == 6
        for number in (1, 3, 5):
            source.ended.put_nowait(number)
        groups, _ = await asyncio.wait_for(take, 5)
        assert names(groups) == ["1", "3", "5"]
        ahead.commit()
        for number in (6, 7, 0, 2):  # of the first six, 4 would be too old after this step
            source.ended.put_nowait(number)
        second = asyncio.ensure_future(ahead.take())
        await asyncio.sleep(0.01)
        assert not second.done()
        source.ended.put_nowait(4)
        assert names((await asyncio.wait_for(second, 5))[0]) == ["0", "2", "4"]

    asyncio.run(main())


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_a_restart_keeps_what_was_generated(staleness, seed):
    """At any moment of a step; finished groups are not asked for again, those under way go on with what they have."""

    async def main():
        source, trained = Source(seed), []
        ahead = queue(source, staleness)
        for step in range(12):
            for _ in range(2):  # twice a step: before it is taken, and after
                data = to_bytes(ahead.snapshot(), {"drawn": source.drawn})
                await ahead.close()
                old, source = source, Source(100 * seed + step)
                source.steps = old.steps
                snapshot, stream = from_bytes(data)
                source.drawn = stream["drawn"]
                finished = set(names(group for _, group in snapshot.finished))
                ahead = queue(source, staleness, updates=step)
                ahead.restore(snapshot)
                assert not finished & {unfinished.task.task_id for unfinished in source.tasks.values()}
                groups, _ = await taken(ahead, source)
                assert max(step - ahead._started[n].updates for n in ahead._taken) <= staleness
            trained += names(groups)
            ahead.commit()
        assert Counter(trained) == Counter(str(i) for i in range(36))

    asyncio.run(main())


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_refused_groups_that_are_not_replaced_leave_later_steps_full(staleness):
    async def main():
        source = Source()
        ahead, sizes = queue(source, staleness, keep=lambda group: int(group.task.task_id) % 2 == 1), []
        for _ in range(12):
            sizes.append(len((await taken(ahead, source))[0]))
            ahead.commit()
        assert sum(sizes[:6]) >= 6 and sum(sizes[6:]) >= 6  # half of three a step, or more

    asyncio.run(main())


def test_refused_groups_are_replaced_until_the_rounds_are_used_up():
    async def main():
        source = Source()
        ahead = queue(source, 1, keep=lambda group: int(group.task.task_id) % 2 == 1, max_rounds=3)
        for _ in range(3):
            groups, refused = await taken(ahead, source)
            assert len(groups) == 3 and all(int(name) % 2 for name in names(groups))
            assert all(int(name) % 2 == 0 for name in names(refused))
            ahead.commit()
        never = queue(Source(), 0, keep=lambda group: False, max_rounds=2)
        groups, refused = await taken(never, never._rollouts)
        assert groups == [] and len(refused) == 6

    asyncio.run(main())


def test_a_failure_is_raised_and_what_was_finished_stays():
    class Broken(Source):
        async def next_group(self):
            if self.drawn and not self.ended.qsize():
                raise OSError("no engine")
            return await super().next_group()

    async def main():
        source = Broken()
        ahead = queue(source, 1)
        ahead.fill()
        source.ended.put_nowait(0)
        with pytest.raises(OSError, match="no engine"):
            await ahead.take()
        snapshot = ahead.snapshot()
        assert names(group for _, group in snapshot.finished) == ["0"]
        assert sorted(unfinished.task.task_id for _, unfinished in snapshot.unfinished) == list("12345")
        with pytest.raises(ValueError, match="after 3"):
            queue(source, 1, updates=3).restore(snapshot)

    asyncio.run(main())
