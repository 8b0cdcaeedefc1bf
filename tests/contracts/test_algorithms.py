"""Every file of algorithms/: advantages have the rows' shapes and keep to the mask, the loss is a pure function per token.

Not covered: whether an algorithm learns anything; needs_critic and needs_reference, which nothing reads yet.
"""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_agent import registry
from megatron_agent.algorithms.base import Algorithm
from megatron_agent.options import build
from megatron_agent.types import LossInputs, TrainSample

ALGORITHMS = registry.names("algorithms")


def make(name):
    return registry.resolve("algorithms", name)()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_shape(name):
    component = registry.resolve("algorithms", name)
    assert issubclass(component, Algorithm) and dataclasses.is_dataclass(component.Config)
    assert isinstance(component.needs_critic, bool) and isinstance(component.needs_reference, bool)
    config = build(component.Config, {}, "algorithm")
    assert component(config).config is config and component().config == config
    assert pickle.loads(pickle.dumps(component(config))).config == config  # it goes to every rank


@st.composite
def batches(draw):
    samples = []
    for group in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 4))):
            mask = draw(st.lists(st.booleans(), min_size=1, max_size=6))
            reward = draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0]))
            zeros = [0.0] * len(mask)
            samples.append(TrainSample([1] * len(mask), mask, zeros, list(zeros), [], str(group), reward))
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
    (grad,) = torch.autograd.grad(make(name).loss(inputs).loss_R.sum(), logprobs)
    assert grad[0] < 0 < grad[1]
