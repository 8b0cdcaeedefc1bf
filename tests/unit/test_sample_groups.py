"""Drawing tasks until a step is full, and greedy trajectories beside the sampled ones."""

import asyncio
from types import SimpleNamespace

from megatron_agent.algorithms.dapo import DAPO
from megatron_agent.algorithms.grpo import GRPO
from megatron_agent.algorithms.remax import ReMax
from megatron_agent.stages import Stages
from megatron_agent.training.samples import scored_samples
from megatron_agent.types import RewardParts, Task, Trajectory, TrajectoryGroup, Turn, Unscored


def trajectory(task, reward):
    parts = Unscored("judge") if reward is None else RewardParts({"x": reward}, {"x": 1.0})
    return Trajectory(task, 0, [1], [Turn([2], [-0.5], [1], "", "stop", tool_reward=0.25)], reward=parts)


class World:
    """A stream of tasks 0, 1, 2, ...; `rewards[i]` are those of task i's group, the last of them is greedy's."""

    def __init__(self, rewards):
        self.rewards, self.drawn, self.rounds = rewards, 0, []

    def next(self, count):
        self.drawn += count
        return [Task(str(i), "", (), (), "", "", "") for i in range(self.drawn - count, self.drawn)]

    def num_wanted(self, num_groups):
        return num_groups

    async def sample(self, tasks, step, num_groups):
        self.rounds.append(num_groups)
        rewards = [self.rewards[int(task.task_id)][:-1] for task in tasks]
        return [TrajectoryGroup(task, [trajectory(task, r) for r in group]) for task, group in zip(tasks, rewards)]

    async def greedy(self, tasks):
        return [trajectory(task, self.rewards[int(task.task_id)][-1]) for task in tasks]


def play(rewards, algorithm, prompts=2):
    world = World(rewards)
    parts = SimpleNamespace(
        data=SimpleNamespace(train=world), algorithm=algorithm, rollouts=world,
        config=SimpleNamespace(training=SimpleNamespace(prompts_per_step=prompts)),
    )  # fmt: skip
    parts.with_greedy = lambda groups: Stages.with_greedy(parts, groups)
    parts._sample = lambda *arguments: Stages._sample(parts, *arguments)
    kept, refused = asyncio.run(Stages.sample_groups(parts, 1))
    return world, kept, refused


REWARDS = [[1, 1, 0], [0, 1, 0], [0, 0, 0], [None, 1, 0], [0, 1, 1], [1, 1, 0]]


def test_dapo_refills_until_the_step_is_full():
    world, kept, refused = play(REWARDS, DAPO())
    assert [group.task.task_id for group in kept] == ["1", "4"] and [g.task.task_id for g in refused] == ["0", "2", "3"]
    assert world.rounds == [2, 1, 1, 1] and world.drawn == 5


def test_dapo_gives_up_after_its_rounds():
    world, kept, refused = play(REWARDS, DAPO(DAPO.Config(max_sampling_rounds=2)))
    assert len(kept) == 1 and len(refused) == 2 and world.rounds == [2, 1]


def test_others_take_what_comes():
    world, kept, refused = play(REWARDS, GRPO())
    assert [group.task.task_id for group in kept] == ["0", "1"] and refused == [] and world.rounds == [2]
    assert [sample.baseline_reward for sample in scored_samples(kept)] == [None] * 4


def test_remax_compares_with_greedy():
    _, kept, _ = play([[1, 0.5, 0.25], [1, 0, None]], ReMax())
    samples = scored_samples(kept)
    assert [sample.baseline_reward for sample in samples] == [0.5, 0.5, None, None]  # with its process reward
    assert [row[1] for row in ReMax().advantages(samples)] == [0.75, 0.25, 0.0, 0.0]
