"""Rounds of weights as the driver takes them, with ranks and engines that only note what they are told (the real ones:
tests/tools/test_kill_engines.py, tools/check_sync.py)."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_agent import sync as sync_module
from megatron_agent.config import parse
from megatron_agent.errors import WeightSyncError
from megatron_agent.sync import WeightSync
from megatron_agent.types import SyncRound


class Plan:
    def __init__(self, relays):
        self.relays, self.replicas, self.tensor_parallel = relays, 3, 1

    def sends(self, rank):
        return []

    def receives(self, engine, rank):
        return []

    def relays_to(self, engine):
        return engine + 1 if self.relays and engine < 2 else None

    def check_engine(self, rank, shapes):
        pass

    def describe(self):
        return ""


class Actor:
    def __init__(self):
        self.rounds = []

    async def places(self):
        return [("host", "trainer")]

    async def set_receivers(self, copies):
        pass

    async def send_weights(self, sync_round, only):
        self.rounds.append(sorted(only))
        return {}


class Pool:
    """Engine 1 dies in the first round when it relays."""

    def __init__(self, dies=()):
        self.alive, self.dies, self.plans, self.versions, self.is_waiting = {0, 1, 2}, set(dies), [], [], False
        self.on_restart = None

    async def settled(self):
        pass

    async def places(self):
        return [[("host", f"engine {index}")] for index in self.alive]

    async def describe(self):
        return []

    def watch(self):
        pass

    async def init_weight_transfer(self, infos):
        self.plans.append([info["relay_to"] for info in infos])

    async def sync_weights(self, update, version, joining=None):
        assert SyncRound(**update["sync_round"]).port > 0
        if dead := self.alive & self.dies:
            self.alive -= dead
            raise WeightSyncError("training ranks [0] did not send everything")
        self.versions.append(version)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(sync_module, "transfer_plan", lambda *arguments, relay=False: Plan(relay))
    monkeypatch.setattr(sync_module.cluster, "num_gpus", lambda: 0)
    monkeypatch.setattr(sync_module.cluster, "node_address", lambda: "127.0.0.1")

    def make(pool, relay="always"):
        config = parse({"rollout": {"num_engines": 3, "weight_relay": relay}, "training": {"max_tokens_per_microbatch": 8192}})
        return WeightSync(config, SimpleNamespace(), Actor(), pool)

    return make


FAN_OUT, CHAIN = [None, None, None], [1, 2, None]


def test_relays_are_a_wish(driver):
    for relay, plan in (("always", CHAIN), ("never", FAN_OUT), ("auto", FAN_OUT)):  # auto: not on CPUs
        pool = Pool()
        asyncio.run(driver(pool, relay).push(1))
        assert pool.plans == [plan] and pool.versions == [1]


def test_a_chain_that_breaks_is_given_up_and_taken_up_again(driver):
    async def main():
        pool = Pool(dies={1})
        weights = driver(pool)
        await weights.push(1)  # the round fails, and is taken again by those that are left, from the trainer
        assert pool.plans == [CHAIN, FAN_OUT] and pool.versions == [1] and weights.version == 1
        assert weights.actor.rounds == [[0, 1, 2], [0, 2]]
        await weights.push(2)
        assert pool.plans == [CHAIN, FAN_OUT] and pool.versions == [1, 2]
        pool.alive, pool.dies = {0, 1, 2}, set()
        await weights.push(3)
        assert pool.plans == [CHAIN, FAN_OUT, CHAIN] and pool.versions == [1, 2, 3]

    asyncio.run(main())


def test_a_living_engine_that_fails_stops_the_run(driver):
    class Failing(Pool):
        async def sync_weights(self, update, version, joining=None):
            raise WeightSyncError("bytes differ")

    with pytest.raises(WeightSyncError, match="bytes differ"):
        asyncio.run(driver(Failing()).push(1))


def test_who_comes_back_gets_the_version_of_the_round_that_it_missed(driver):
    async def main():
        pool, seen = Pool(), []

        async def init(info):
            seen.append(info["relay_to"])

        weights = driver(pool)
        await weights.push(1)
        pool.alive, pool.is_waiting = set(), True
        async with weights.lock:
            handle = SimpleNamespace(init_weight_transfer=SimpleNamespace(remote=init))
            back = asyncio.create_task(pool.on_restart(2, handle))
            await weights.push(2)  # nobody is there to get it
            assert pool.versions == [1]
        await back
        assert seen == [None] and pool.versions == [1, 2] and weights.actor.rounds[-1] == [2]

    asyncio.run(main())
