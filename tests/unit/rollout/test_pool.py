"""Stickiness, balance and failover of the pool, with stand-ins for Ray handles (the real ones: tests/integration)."""

import asyncio

import pytest
from ray.exceptions import RayActorError, RayTaskError

from megatron_agent.errors import EngineError, RequestLostError, WeightSyncError
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.rollout.pool import EnginePool


class Remote:
    def __init__(self, function):
        self.remote = function


class Handle:
    def __init__(self, name, gate=None):
        self.name, self.gate, self.alive, self.rows, self.versions = name, gate, True, [], []
        self.generate, self.sync_weights = Remote(self._generate), Remote(self._sync)
        self.is_alive, self.until_dead = Remote(self._is_alive), Remote(self._until_dead)

    async def _generate(self, row, images, sampling):
        if not self.alive:
            raise RayActorError
        self.rows.append(row)
        if self.gate:
            await self.gate.wait()
        return Generation([self.name], [0.0], [0], "stop")

    async def _sync(self, update, version):
        if not self.alive:
            raise RayActorError
        self.versions.append((update, version))

    async def _until_dead(self):
        await asyncio.sleep(3600)

    async def _is_alive(self):
        if not self.alive:
            raise RayActorError
        return True


def test_turns_of_a_trajectory_stay_and_work_is_spread():
    async def main():
        gate = asyncio.Event()
        handles = [Handle(0, gate), Handle(1, gate)]
        pool = EnginePool(handles)
        calls = [asyncio.create_task(pool.generate(name, [0] * length, [], Sampling(max_tokens=1)))
                 for name, length in (("a", 100), ("b", 10), ("c", 10), ("d", 10))]  # fmt: skip
        await asyncio.sleep(0)
        gate.set()
        engines = [(await call).token_ids[0] for call in calls]
        again = [(await pool.generate(name, [0], [], Sampling())).token_ids[0] for name in "abcd"]
        return engines, again

    engines, again = asyncio.run(main())
    assert engines == [0, 1, 1, 1]
    assert again == engines


@pytest.mark.fault
def test_a_dead_engine_hands_its_trajectories_on():
    async def main():
        handles = [Handle(0), Handle(1)]
        pool = EnginePool(handles)
        first = await pool.generate("a", [1], [], Sampling())
        handles[0].alive = False
        second = await pool.generate("a", [1, 2], [], Sampling())
        await pool.sync_weights({"n": 1}, 4)
        handles[1].alive = False
        with pytest.raises(EngineError, match="every rollout engine"):
            await pool.generate("a", [1, 2], [], Sampling())
        return first.token_ids + second.token_ids, handles

    engines, handles = asyncio.run(main())
    assert engines == [0, 1]
    assert handles[1].rows == [[1, 2]]
    assert (handles[0].versions, handles[1].versions) == ([], [({"n": 1}, 4)])


@pytest.mark.fault
def test_a_request_that_kills_engine_after_engine_is_given_up():
    class Fragile(Handle):
        async def _generate(self, row, images, sampling):
            if row == [13]:
                self.alive = False
            return await super()._generate(row, images, sampling)

    async def main():
        handles = [Fragile(i) for i in range(4)]
        pool = EnginePool(handles)
        with pytest.raises(RequestLostError, match="3 engines died under one request of 1 tokens"):
            await pool.generate("a", [13], [], Sampling())
        assert pool.handles == [handles[3]]
        assert (await pool.generate("b", [1], [], Sampling())).token_ids == [3]
        with pytest.raises(EngineError, match="every rollout engine"):
            await EnginePool([Fragile(i) for i in range(3)]).generate("a", [13], [], Sampling())

    asyncio.run(main())


def test_an_engine_whose_vllm_died_is_left_and_a_refused_request_is_raised():
    class Broken(Handle):
        def __init__(self, name, serves):
            super().__init__(name)
            self.is_alive = Remote(lambda: self._serves(serves))

        async def _serves(self, serves):
            return serves

        async def _generate(self, row, images, sampling):
            raise RayTaskError("generate", "traceback", EngineError("no")).as_instanceof_cause()

    async def main():
        pool = EnginePool([Broken(0, serves=False), Handle(1)])
        assert (await pool.generate("a", [1], [], Sampling())).token_ids == [1]
        assert len(pool.handles) == 1
        with pytest.raises(EngineError):
            await EnginePool([Broken(0, serves=True)]).generate("a", [1], [], Sampling())

    asyncio.run(main())


def test_an_empty_pool_is_refused():
    with pytest.raises(EngineError):
        EnginePool([])


@pytest.mark.fault
def test_a_sync_goes_on_without_the_dead(caplog):
    async def main():
        handles = [Handle(0), Handle(1)]
        pool = EnginePool(handles)
        handles[0].alive = False
        await pool.sync_weights({"n": 1}, 4)
        assert pool.handles == [handles[1]] and handles[1].versions == [({"n": 1}, 4)]
        assert "rollout engine 0 died, 1 left" in caplog.text
        handles[1].alive = False
        with pytest.raises(EngineError, match="every rollout engine has died, in the sync of weights 5: rollout engine 1"):
            await pool.sync_weights({}, 5)

    asyncio.run(main())


@pytest.mark.parametrize("error", [WeightSyncError("bytes differ"), ValueError("bytes differ")])
def test_a_living_engine_whose_sync_fails_stops_the_run(error):
    class Failing(Handle):
        async def _sync(self, update, version):
            raise RayTaskError("sync_weights", "traceback of bytes differ", error).as_instanceof_cause()

    async def main():
        handles = [Failing(0), Handle(1)]
        with pytest.raises(WeightSyncError, match="bytes differ"):
            await EnginePool(handles).sync_weights({}, 4)
        assert handles[1].versions == [({}, 4)]

    asyncio.run(main())


def test_an_engine_that_does_not_start_says_why_on_one_line():
    died = RayActorError(error_msg="The actor died, ray::Engine.__init__() (pid=1)\n  File x\n    raise\n"
                                   "megatron_agent.errors.EngineError: vLLM did not start:\n  no memory")  # fmt: skip

    class Stillborn(Handle):
        def __init__(self, name):
            super().__init__(name)
            self.is_alive = Remote(self._start)

        async def _start(self):
            raise died

    with pytest.raises(EngineError) as caught:
        asyncio.run(EnginePool([Stillborn(0)]).started())
    why = "megatron_agent.errors.EngineError: vLLM did not start: no memory"
    assert str(caught.value) == f"rollout engine 0 died: {why}"


@pytest.mark.fault
def test_a_dead_engine_is_started_again_and_serves_once_it_has_the_weights():
    """The only engine dies: its trajectory waits for the next one, which gets the weights before it is asked."""

    async def main():
        first, second, seen = Handle(0), Handle(1), []

        async def give_weights(index, handle):
            seen.append((index, handle.name, len(handle.rows)))
            await asyncio.sleep(0.01)

        pool = EnginePool([first], restart=lambda index: second)
        pool.on_restart = give_weights
        first.alive = False
        turn = await pool.generate("a", [1, 2], [], Sampling())
        assert turn.token_ids == [1] and seen == [(0, 1, 0)] and pool.alive == {0} and pool.num_restarts == 1

    asyncio.run(main())


def test_an_engine_that_does_not_come_back_is_given_up(caplog):
    async def main():
        first, second, starts = Handle(0), Handle(1), []

        def restart(index):
            starts.append(index)
            dead = Handle(9)
            dead.alive = False
            return dead

        pool = EnginePool([first, second], restart, max_restarts=2)
        first.alive = False
        assert (await pool.generate("a", [1], [], Sampling())).token_ids == [1]
        while pool._coming_back:
            await asyncio.sleep(0.01)
        assert starts == [0, 0] and pool.alive == {1}
        assert caplog.text.count("rollout engine 0 could not be started again") == 2
        second.alive = False
        pool._restarts_left[1] = 0
        with pytest.raises(EngineError, match="every rollout engine has died"):
            await pool.generate("a", [1], [], Sampling())

    asyncio.run(main())


def test_weights_go_to_one_that_joins_only():
    async def main():
        handles, third = [Handle(0), Handle(1)], Handle(2)
        pool = EnginePool(handles)
        await pool.sync_weights({"n": 1}, 7, joining=(2, third))
        assert third.versions == [({"n": 1}, 7)] and handles[0].versions == []
        third.alive = False
        with pytest.raises(EngineError, match="rollout engine 2 died"):
            await pool.sync_weights({"n": 1}, 7, joining=(2, third))

    asyncio.run(main())
