"""Every file of algorithms/: advantages have the rows' shapes and keep to the mask, the loss is a pure function per token,
and its gradient is that of its value.

Whether an algorithm learns: test_bandit.py. Over ranks and micro-batches: tests/distributed/test_gradient_splits.py.
"""

import copy
import dataclasses
import inspect
import json
import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_agent import registry
from megatron_agent.algorithms.base import Algorithm
from megatron_agent.algorithms.options import AGGREGATIONS, CriticOptions
from megatron_agent.errors import ConfigError
from megatron_agent.options import build
from megatron_agent.types import LossInputs, TrainSample

ALGORITHMS = registry.names("algorithms")


def make(name):
    return registry.resolve("algorithms", name)()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_shape(name):
    component = registry.resolve("algorithms", name)
    assert issubclass(component, Algorithm) and dataclasses.is_dataclass(component.Config)
    config = build(component.Config, {}, "algorithm")
    algorithm = component(config)
    assert algorithm.config is config and component().config == config
    assert pickle.loads(pickle.dumps(algorithm)).config == config  # it goes to every rank
    needs = ("needs_critic", "needs_greedy", "needs_reference", "needs_full_kl", "needs_old_logprobs")
    assert all(isinstance(getattr(algorithm, name), bool) for name in needs)
    assert not algorithm.needs_critic or isinstance(config.critic, CriticOptions)
    assert algorithm.aggregation in AGGREGATIONS and algorithm.max_sampling_rounds >= 1
    state = json.loads(json.dumps(algorithm.state()))
    component(config).load_state(state)
    assert algorithm.state() == state
    assert " " in inspect.getdoc(component) and re.search(r"arXiv \d{4}\.\d{5}", inspect.getmodule(component).__doc__)


@st.composite
def batches(draw):
    samples = []
    for group in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 4))):
            mask = draw(st.lists(st.booleans(), min_size=1, max_size=6))
            reward = draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0]))
            zeros = [0.0] * len(mask)
            samples.append(TrainSample([1] * len(mask), mask, zeros, list(zeros), [], str(group), reward))
            on_actions = [[draw(st.floats(-3, 3)) if own else 0.0 for own in mask] for _ in range(4)]
            sample = samples[-1]
            sample.values_T, sample.old_logprobs_T, sample.reference_logprobs_T, sample.process_rewards_T = on_actions
            sample.baseline_reward = draw(st.none() | st.floats(-1, 1))
    return samples


@pytest.mark.parametrize("name", ALGORITHMS)
@settings(max_examples=60, deadline=None)
@given(samples=batches())
def test_advantages(name, samples):
    before = copy.deepcopy(samples)
    advantages = make(name).advantages(samples)
    assert samples == before, "the samples were changed"
    assert len(advantages) == len(samples)
    for sample, row in zip(samples, advantages):
        assert len(row) == sample.num_tokens and all(isinstance(value, float) and math.isfinite(value) for value in row)
        assert all(value == 0.0 for value, own in zip(row, sample.action_mask_T) if not own)
    assert make(name).advantages(samples) == advantages
    if make(name).needs_critic:
        returns = make(name).returns(samples)
        assert [len(row) for row in returns] == [sample.num_tokens for sample in samples]
        assert all(v == 0.0 for row, s in zip(returns, samples) for v, own in zip(row, s.action_mask_T) if not own)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_no_action_is_not_looked_at(name):
    """Prompts and observations of any length, anywhere, with any numbers: the actions' advantages stay the same."""

    def rows(gap, junk):
        made = []
        for index, reward in enumerate([0.0, 1.0, 0.25, 1.0]):
            parts = [(gap, False), (2, True), (gap, False), (1 + index % 2, True), (gap, False)]
            mask = [own for count, own in parts for _ in range(count)]
            per_token = iter(range(1, 100))
            values = [0.1 * next(per_token) if own else junk for own in mask]
            rewards = [0.05 if own else 0.0 for own in mask]
            made.append(TrainSample([1] * len(mask), mask, values, [0.0] * len(mask), [], str(index // 2), reward))
            made[-1].values_T = made[-1].old_logprobs_T = made[-1].reference_logprobs_T = values
            made[-1].process_rewards_T, made[-1].baseline_reward = rewards, 0.5
        return made

    def on_actions(samples):
        found = make(name).advantages(samples)
        return [[v for v, own in zip(row, s.action_mask_T) if own] for row, s in zip(found, samples)]

    assert on_actions(rows(1, 0.0)) == on_actions(rows(3, 77.0))


def loss_inputs(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand(num_tokens, generator=generator)

    return LossInputs(
        logprobs_R=draw(-6, 0).requires_grad_(),
        old_logprobs_R=draw(-6, 0),
        rollout_logprobs_R=draw(-6, 0),
        advantages_R=draw(-2, 2),
        sample_index_R=(torch.arange(num_tokens) // 3).long(),
        num_samples=max(1, -(-num_tokens // 3)),
        entropy_R=draw(0, 3),
        reference_logprobs_R=draw(-6, 0),
        lag_R=(torch.arange(num_tokens) % 3).long(),
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 10])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_is_pure_and_per_token(name, num_tokens):
    inputs = loss_inputs(num_tokens)
    kept = {k: v.detach().clone() for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    algorithm = make(name)
    outputs = algorithm.loss(inputs)
    assert outputs.loss_R.shape == (num_tokens,) and outputs.loss_R.isfinite().all() and outputs.loss_R.requires_grad
    (grad,) = torch.autograd.grad(outputs.loss_R.sum(), inputs.logprobs_R)
    assert grad.isfinite().all()
    for metric, values in outputs.metrics_R.items():
        assert values.shape == (num_tokens,) and not values.requires_grad, metric
    for field, value in kept.items():
        assert torch.equal(getattr(inputs, field), value), f"{field} was changed"
    again = algorithm.loss(loss_inputs(num_tokens))
    assert torch.equal(again.loss_R, outputs.loss_R)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_something_is_learned_from_an_advantage(name):
    """At the old policy the gradient pulls a good token up and a bad one down."""
    logprobs = torch.full((2,), -1.0, requires_grad=True)
    old = torch.full((2,), -1.0)
    inputs = LossInputs(logprobs, old, old, torch.tensor([1.0, -1.0]), torch.tensor([0, 1]), 2, torch.ones(2))
    inputs.reference_logprobs_R = torch.tensor([-0.5, -1.5])  # a teacher of the same mind
    (grad,) = torch.autograd.grad(make(name).loss(inputs).loss_R.sum(), logprobs)
    assert grad[0] < 0 < grad[1]


OPTIONS = {
    "plain": {},
    "kl in the loss, entropy": {"kl": {"coefficient": 0.3, "estimator": "k3"}, "entropy_coefficient": 0.2},
    "sequence weights": {"importance": {"correction": "truncate", "level": "sequence", "max_lag": 1}},
    "clipped against the engine": {"importance": {"correction": "clip"}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_the_old_policy_ratios_are_one_and_nothing_is_clipped(name, options):
    """On the first update after a sync, whatever the options."""
    component = registry.resolve("algorithms", name)
    try:
        algorithm = component(build(component.Config, OPTIONS[options], "algorithm"))
    except ConfigError:
        pytest.skip("an algorithm that has no such option")
    inputs = loss_inputs(12)
    inputs.old_logprobs_R = inputs.logprobs_R.detach()
    if algorithm.config.importance.correction == "clip":
        inputs.rollout_logprobs_R = inputs.old_logprobs_R  # fresh tokens
    metrics = algorithm.loss(inputs).metrics_R
    assert (metrics["ratio"] - 1).abs().max() <= 1e-5 and metrics["clip_fraction"].sum() == 0
