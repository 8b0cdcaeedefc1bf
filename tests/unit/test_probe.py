"""The probe of the log-prob gap against engines and a trainer that are not there; the real ones: test_train_async.py."""

import asyncio
from types import SimpleNamespace

from megatron_agent.errors import RequestLostError
from megatron_agent.probe import NUM_TOKENS, probe
from megatron_agent.rollout.generation import Generation
from megatron_agent.training.loss import LossStats
from megatron_agent.types import ALL_TOKENS, LossUse, Task, Trajectory, TrajectoryGroup, Turn

IMAGE_PAD = 99


def trajectory(name, num_turns=2):
    turns = [Turn([5, 6], [-1.0, -1.0], [1, 1], "", "stop", observation_token_ids=[7]) for _ in range(num_turns)]
    return Trajectory(Task(name, "", (), (), "", "", ""), 0, [1, 2], turns, loss_use=LossUse.MASK)


class World:
    def __init__(self):
        self.asked, self.samples, self.temperature = [], [], None
        self.lock = asyncio.Lock()
        config = SimpleNamespace(rollout=SimpleNamespace(temperature=0.7, max_model_len=20))
        rollouts = SimpleNamespace(pool=self, renderer=SimpleNamespace(forbidden_ids={IMAGE_PAD}))
        self.parts = SimpleNamespace(config=config, rollouts=rollouts, actor=self, weights=self, weight_version=4)
        self.support = ALL_TOKENS

    async def generate(self, name, row, images, sampling):
        async with self.lock:  # an engine that comes back gets its weights under it, and only then answers
            self.asked.append((row, sampling.max_tokens, sampling.temperature))
        if len(self.asked) == 2:
            raise RequestLostError("three engines died under it")
        return Generation([11, IMAGE_PAD, 12], [-0.1, -0.2, -0.3], [4, 4, 4], "length")

    async def fill_old_logprobs(self, samples, temperature):
        assert self.lock.locked()
        self.samples, self.temperature = samples, temperature
        return LossStats(sums={"logprob_gap_mean": 0.25, "entropy": 1.0}, counts={"logprob_gap_mean": 1, "entropy": 1})


def test_last_turns_are_sampled_again_under_the_current_weights():
    world = World()
    groups = [TrajectoryGroup(t.task, [t, t]) for t in (trajectory("a"), trajectory("lost"), trajectory("c", 1))]
    found = asyncio.run(asyncio.wait_for(probe(world.parts, groups), 5))
    assert found == {"logprob_gap_mean": 0.25} and world.temperature == 0.7
    assert world.asked[0] == ([1, 2, 5, 6, 7], 15, 0.7) and world.asked[2] == ([1, 2], 18, 0.7) and NUM_TOKENS > 18
    first, second = world.samples  # the one that was lost is left out
    assert first.token_ids_T == [1, 2, 5, 6, 7, 11] and first.action_mask_T == [False, False, True, True, False, True]
    assert first.lag_T == [0, 0, 3, 3, 0, 0] and second.token_ids_T == [1, 2, 11]  # cut before what has no picture


def test_nothing_to_ask_about():
    world = World()
    assert asyncio.run(probe(world.parts, [TrajectoryGroup(trajectory("a", 0).task, [trajectory("a", 0)])])) == {}
    assert world.asked == []
