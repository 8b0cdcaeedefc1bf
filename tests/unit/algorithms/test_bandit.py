"""Every algorithm learns a small game whose best policy is known: its advantages, the learner's order of things and the loss
of training/loss.py around a table of logits in place of a Megatron model.

Three tasks; a first token of four, an observation, a second token of four. The right first token earns 0.5 at once, the
right second after it 1, and the tasks pay 0, 0.5 or 1 for taking part: what a critic has to find out.
"""

import asyncio
import math
import random

import pytest
import torch

from megatron_agent import registry
from megatron_agent.training.actor import TrainingConfig, minibatches
from megatron_agent.training.critic import ValueObjective, explained_variance
from megatron_agent.training.learner import Learner
from megatron_agent.training.loss import LossStats, PolicyOutput, microbatch_loss
from megatron_agent.training.samples import scored_samples
from megatron_agent.types import BatchSize, MicroBatch, RewardParts, Task, Trajectory, TrajectoryGroup, Turn

RIGHT = ((2, 0), (1, 3), (0, 1))
FEE = (0.0, 0.5, 1.0)
GROUP, STEPS, LR = 8, 60, 0.1
OBSERVATION = [9, 9]


def states(sample):
    """Where the two actions are taken: at (task, first) and (task, first token taken)."""
    task, first = sample.token_ids_T[0], sample.token_ids_T[1]
    return [task, 3 + 4 * task + first]


class Table:
    """A policy (or a critic) over 15 states with the methods of Actor (and Critic) that a learner asks for."""

    def __init__(self, width, config=None):
        self.table = torch.zeros(15, width, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.table], lr=LR)
        self.config = config or TrainingConfig(lr=LR)

    def batch(self, samples):
        def gather(name):
            rows = [getattr(sample, name) for sample in samples]
            if any(row is None for row in rows):
                return None
            return torch.tensor([v for row, s in zip(rows, samples) for v, own in zip(row, s.action_mask_T) if own])

        count = 2 * len(samples)
        return MicroBatch(
            token_ids_T=torch.zeros(0), position_ids_3T=torch.zeros(3, 0), cu_seqlens=torch.zeros(1),
            target_positions_R=torch.tensor([state for sample in samples for state in states(sample)]),
            target_ids_R=gather("token_ids_T"), sample_index_R=torch.arange(count) // 2, advantages_R=gather("advantages_T"),
            rollout_logprobs_R=gather("rollout_logprobs_T"), old_logprobs_R=gather("old_logprobs_T"),
            after_image_R=torch.zeros(count, dtype=torch.bool), patches_NP=None, grids_I3=None,
            sample_ids=list(range(len(samples))), old_values_R=gather("values_T"), returns_R=gather("returns_T"),
            reference_logprobs_R=gather("reference_logprobs_T"),
        )  # fmt: skip

    def output(self, batch):
        distribution = self.table[batch.target_positions_R].log_softmax(-1)
        logprobs = distribution.gather(1, batch.target_ids_R[:, None])[:, 0]
        return PolicyOutput(logprobs, -(distribution.exp() * distribution).sum(-1))

    def fill(self, samples, name, values):
        for sample, pair in zip(samples, values.detach().view(-1, 2).tolist()):
            of_actions = iter(pair)
            setattr(sample, name, [next(of_actions) if own else 0.0 for own in sample.action_mask_T])

    def steps(self, samples, num_minibatches, share):
        for part in minibatches(samples, num_minibatches):
            self.optimizer.zero_grad()
            share(self.batch(part), BatchSize.of(part)).backward()
            self.optimizer.step()

    async def fill_old_logprobs(self, samples, temperature):
        self.fill(samples, "old_logprobs_T", self.output(self.batch(samples)).logprobs_R)
        return LossStats()

    async def fill_reference_logprobs(self, samples, temperature, own):
        self.fill(samples, "reference_logprobs_T", self.output(self.batch(samples)).logprobs_R)

    async def update(self, samples, algorithm, lr, num_minibatches, temperature):
        await self.fill_old_logprobs(samples, temperature)
        stats = LossStats()

        def share(batch, size):
            return microbatch_loss(self.output(batch), batch, algorithm, size, stats)

        self.steps(samples, num_minibatches, share)
        return stats.means()

    async def fill_values(self, samples):
        self.fill(samples, "values_T", self.table[self.batch(samples).target_positions_R, 0])

    async def update_values(self, samples, objective, lr, num_minibatches):
        stats = LossStats()

        def share(batch, size):
            return ValueObjective(objective.clip).loss(self.table[batch.target_positions_R, 0], batch, size, stats)

        self.steps(samples, num_minibatches, share)
        return {"value_explained_variance": explained_variance(stats.means())}

    async def to_host(self):
        pass


def play(probabilities, task, rng=None):
    """One episode, sampled or (without an rng) greedy. `probabilities[state]` are those of four tokens."""
    turns, state = [], task
    reward = {"fee": FEE[task], "answer": 0.0}
    is_right = True
    for position in range(2):
        chances = probabilities[state]
        token = chances.index(max(chances)) if rng is None else rng.choices(range(4), chances)[0]
        is_right = is_right and token == RIGHT[task][position]
        observation, process = (OBSERVATION, 0.5 * is_right) if position == 0 else ([], 0.0)
        turns.append(Turn([token], [math.log(chances[token])], [0], "", "stop", observation, tool_reward=process))
        state = 3 + 4 * task + token
    reward["answer"] = float(is_right)
    parts = RewardParts(reward, dict.fromkeys(reward, 1.0))
    return Trajectory(Task(str(task), "", (), (), "", "", ""), 0, [task], turns, reward=parts)


def best_policy():
    """With a little doubt."""
    best = Table(4)
    with torch.no_grad():
        for task, (first, second) in enumerate(RIGHT):
            best.table[task, first] = best.table[3 + 4 * task : 7 + 4 * task, second] = 5.0
    return best


def chance_of_the_best(policy):
    probabilities = policy.table.detach().softmax(-1)
    pairs = [probabilities[t, a] * probabilities[3 + 4 * t + a, b] for t, (a, b) in enumerate(RIGHT)]
    return [float(pair) for pair in pairs]


async def train(algorithm):
    rng = random.Random(0)
    learner = Learner(Table(4), algorithm)
    learner.critic = Table(1) if algorithm.needs_critic else None
    learner.teacher = best_policy() if algorithm.needs_reference else None
    for step in range(1, STEPS + 1):
        groups, probabilities = [], learner.actor.table.detach().softmax(-1).tolist()
        for task in (step % 3, (step + 1) % 3, (step + 2) % 3):  # each is now and then in the first mini-batch
            for _ in range(algorithm.max_sampling_rounds):
                group = TrajectoryGroup(
                    Task(str(task), "", (), (), "", "", ""),
                    [play(probabilities, task, rng) for _ in range(GROUP)],
                    play(probabilities, task) if algorithm.needs_greedy else None,
                )
                if algorithm.keep_group(scored_samples([group])):
                    groups.append(group)
                    break
        metrics = await learner.update(scored_samples(groups, 0), step, 2, 1.0) if groups else {}
    return learner.actor, metrics


@pytest.mark.parametrize("name", registry.names("algorithms"))
def test_the_best_policy_is_found(name):
    policy, metrics = asyncio.run(train(registry.resolve("algorithms", name)()))
    assert min(chance_of_the_best(policy)) > 0.9, chance_of_the_best(policy)
    assert metrics.get("value_explained_variance", 1.0) >= 0.8


def test_without_rewards_nothing_is_found():
    """The figure above is not the game's doing."""
    assert max(chance_of_the_best(Table(4))) == pytest.approx(1 / 16)
