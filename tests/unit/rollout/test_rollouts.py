"""What a step and a validation ask the engines for, over-sampling, and groups that outlive their step; the pool is a script.

Not covered: that engines drop the requests of cancelled episodes (tests/integration/test_engine.py).
"""

import asyncio

import pytest

from megatron_agent.rollout.agent_loop import AgentConfig
from megatron_agent.rollout.engine import EnvSampling, RolloutConfig, ValidationSampling
from megatron_agent.rollout.generation import Generation
from megatron_agent.rollout.rollouts import Rollouts
from megatron_agent.types import LossUse, RewardParts, Status, Task

QUESTION = ({"role": "user", "content": "what color is it ?"},)


def task(name, env_name=""):
    return Task(name, "unit", QUESTION, (), env_name, "red", "what color is it ?")


class Pool:
    """Says "red"; tasks in `gates` wait for theirs first."""

    def __init__(self, renderer):
        self.answer = [*renderer.encode("red"), renderer.end_of_turn_id]
        self.asked, self.gates, self.cancelled, self.stop_reason = [], {}, [], "stop"

    async def generate(self, trajectory_id, row, images, sampling):
        self.asked.append((trajectory_id, sampling))
        try:
            await self.gates.get(trajectory_id.split("/")[1], asyncio.sleep)(0)
        except asyncio.CancelledError:
            self.cancelled.append(trajectory_id)
            raise
        tokens = self.answer
        return Generation(tokens, [-0.5] * len(tokens), [1] * len(tokens), self.stop_reason)


class Right:
    async def score(self, trajectory, task):
        return RewardParts({"accuracy": 1.0}, {"accuracy": 1.0})


def make(renderer, agent=None, **config):
    pool = Pool(renderer)
    return Rollouts(pool, renderer, None, Right(), agent or AgentConfig(), RolloutConfig(**config), {}, seed=0), pool


def gate(event):
    async def wait(_):
        await event.wait()

    return wait


def names(groups):
    return [group.task.task_id for group in groups]


def test_a_step_of_over_sampled_groups_cancels_the_slowest(renderer):
    async def main():
        rollouts, pool = make(renderer, group_size=2, oversample=0.5)
        assert rollouts.num_wanted(2) == 3
        pool.gates["a"] = gate(asyncio.Event())
        groups = await rollouts.sample([task(name) for name in "abc"], 1, num_groups=2)
        assert names(groups) == ["b", "c"]
        assert sorted(pool.cancelled) == ["1/a/0", "1/a/1"]
        assert rollouts.num_wanted(2) == 3

    asyncio.run(main())


def test_groups_that_are_carried_over_end_in_a_later_step(renderer):
    async def main():
        rollouts, pool = make(renderer, group_size=2, oversample=0.5, carry_over=True)
        slow = asyncio.Event()
        pool.gates["a"] = gate(slow)
        await rollouts.sample([task(name) for name in "abc"], 1, num_groups=2)
        assert rollouts.num_wanted(2) == 2 and not pool.cancelled
        slow.set()
        pool.gates |= {"d": gate(asyncio.Event())}
        groups = await rollouts.sample([task(name) for name in "de"], 2, num_groups=2)
        assert names(groups) == ["a", "e"]
        await rollouts.close()
        assert sorted(pool.cancelled) == ["2/d/0", "2/d/1"] and rollouts.num_wanted(2) == 3

    asyncio.run(main())


def test_a_cancelled_step_leaves_nothing_behind(renderer):
    async def main():
        rollouts, pool = make(renderer, group_size=1, oversample=1.0, carry_over=True)
        pool.gates["a"] = gate(asyncio.Event())
        step = asyncio.create_task(rollouts.sample([task("a")], 1))
        await asyncio.sleep(0.05)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert pool.cancelled == ["1/a/0"] and rollouts.num_wanted(1) == 2

    asyncio.run(main())


def test_an_end_gets_its_meaning_in_training_only(renderer):
    async def main():
        agent = AgentConfig(on_status={"length": "penalise"}, status_penalty=0.25)
        rollouts, pool = make(renderer, agent, group_size=1)
        pool.stop_reason = "length"
        (group,) = await rollouts.sample([task("a")], 1)
        (trajectory,) = group.trajectories
        assert (trajectory.status, trajectory.loss_use, trajectory.reward.total) == (Status.LENGTH, LossUse.PENALISE, 0.75)
        (trajectory,) = await rollouts.validate([task("a")])
        assert (trajectory.status, trajectory.loss_use, trajectory.reward.total) == (Status.LENGTH, LossUse.KEEP, 1.0)

    asyncio.run(main())


def test_who_samples_how(renderer):
    """A step as `rollout` says, an env of its own settings as they say, a validation as `rollout.validation` says."""
    own = EnvSampling(temperature=0.5, top_k=7, single_response_max_tokens=9, stop=["</done>"])
    validation = ValidationSampling(temperature=0.25, top_p=0.5, num_samples=2)
    agent, limits = AgentConfig(single_response_max_tokens=33, custom_stop=["!"]), {"max_model_len": 256}

    async def main():
        options = {"per_env": {"visual_toolbox_v2": own}, "validation": validation, "ban_special_tokens": True, **limits}
        rollouts, pool = make(renderer, agent, group_size=1, temperature=0.75, top_p=0.9, **options)
        plain, with_tool = task("a"), task("b", "visual_toolbox_v2")
        rollouts._session = lambda task: None  # the tool itself is not played
        await rollouts.sample([plain, with_tool], 1)
        trajectories = await rollouts.validate([with_tool])
        assert [t.sample_index for t in trajectories] == [0, 1]
        return [(s.temperature, s.top_p, s.top_k, s.max_tokens, s.stop) for _, s in pool.asked], pool.asked

    settings, asked = asyncio.run(main())
    assert settings == [
        (0.75, 0.9, 0, 33, ("!",)),
        (0.5, 0.9, 7, 9, ("!", "</done>")),
        (0.25, 0.5, 0, 9, ("!", "</done>")),
        (0.25, 0.5, 0, 9, ("!", "</done>")),
    ]
    (banned,) = {sampling.banned_token_ids for _, sampling in asked}
    assert {renderer.image_pad_id, renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")} <= set(banned)
    assert not {*renderer.stop_token_ids, *renderer.encode("<tool_call>red")} & set(banned)
    assert len({sampling.seed for _, sampling in asked}) == 4


@pytest.mark.parametrize("shown", [False, True])
def test_show_tqdm(renderer, capfd, shown):
    rollouts, _ = make(renderer, AgentConfig(show_tqdm=shown), group_size=2)
    asyncio.run(rollouts.sample([task("a"), task("b")], 1))
    assert ("rollouts of step 1" in capfd.readouterr().err) is shown


@pytest.mark.parametrize(
    ("options", "name"), [({"oversample": -0.5}, "oversample"), ({"carry_over": True}, "carry_over needs rollout.oversample")]
)
def test_config_of_over_sampling(options, name):
    with pytest.raises(ValueError, match=name):
        RolloutConfig(**options)
