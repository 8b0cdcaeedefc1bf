"""GRPO's advantages and loss against closed forms. Masks and denominators: tests/unit/training/test_loss.py."""

import math

import pytest
import torch

from megatron_agent.algorithms.advantages import group_centred, spread
from megatron_agent.algorithms.grpo import GRPO
from megatron_agent.options import build
from megatron_agent.types import LossInputs, TrainSample

DR_GRPO = {"normalise_std": False, "aggregation": "fixed-length", "fixed_length_tokens": 256}


def rows(*rewards_of_groups):
    """One sample per reward, two action tokens of four; groups are interleaved as they may arrive."""
    samples = []
    for group, rewards in enumerate(rewards_of_groups):
        for reward in rewards:
            mask = [False, True, False, True]
            samples.append(TrainSample([1, 2, 3, 4], mask, [0.0] * 4, [0.0] * 4, [], str(group), reward))
    return samples[::2] + samples[1::2]


def test_groups_of_unequal_size():
    """(r - mean) / unbiased std: of 0, 1: 0.5 and std sqrt(1/2); of 1, 2, 6: mean 3, std sqrt(14 / 2)."""
    samples = rows([0.0, 1.0], [1.0, 2.0, 6.0])
    found = {(s.group_id, s.reward): a for s, a in zip(samples, GRPO().advantages(samples))}
    a, b = 0.5 / math.sqrt(0.5), math.sqrt(7.0)
    expected = {("0", 0.0): -a, ("0", 1.0): a, ("1", 1.0): -2 / b, ("1", 2.0): -1 / b, ("1", 6.0): 3 / b}
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx([0.0, value, 0.0, value], abs=1e-12), key


def test_without_std_the_mean_is_taken_off_and_no_more():
    samples = rows([1.0, 2.0, 6.0])
    found = {s.reward: a[1] for s, a in zip(samples, GRPO(GRPO.Config(normalise_std=False)).advantages(samples))}
    assert found == {1.0: -2.0, 2.0: -1.0, 6.0: 3.0}


@pytest.mark.parametrize("rewards", [[0.8] * 5, [0.0, 0.0], [3.0], [0.1 + 0.2, 0.3]])
def test_equal_rewards_and_groups_of_one_teach_nothing(rewards):
    samples = rows(rewards)
    advantages = GRPO().advantages(samples)
    assert advantages == [[0.0] * 4] * len(rewards)
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    GRPO().loss(inputs(logprobs, [-1.3, -1.5], advantages[0][:2])).loss_R.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_one_group_does_not_move_another():
    def normalised(samples):
        return group_centred(samples, [sample.reward for sample in samples], normalise_std=True)

    alone = normalised(rows([0.0, 1.0, 1.0]))
    both = rows([0.0, 1.0, 1.0], [50.0, 60.0])
    values = [v for v, s in zip(normalised(both), both) if s.group_id == "0"]
    assert sorted(values) == pytest.approx(sorted(alone))
    assert sum(alone) == pytest.approx(0, abs=1e-12)


def test_spread_writes_on_action_tokens_only():
    assert spread(rows([1.0]), [2.5]) == [[0.0, 2.5, 0.0, 2.5]]


def inputs(logprobs, old, advantages, entropy=None):
    old, advantages = torch.tensor(old), torch.tensor(advantages)
    zeros = torch.zeros(len(old), dtype=torch.long)
    return LossInputs(logprobs, old, old, advantages, zeros, 1, None if entropy is None else torch.tensor(entropy))


# ratio, advantage -> loss, d loss / d log-prob, clipped; clip ends 0.7 and 1.2
CASES = [
    (1.0, 2.0, -2.0, -2.0, False),
    (1.1, 2.0, -2.2, -2.2, False),
    (1.5, 2.0, -2.4, 0.0, True),  # good and likely enough: no more of it
    (0.5, 2.0, -1.0, -1.0, False),  # good and unlikely: the pessimist keeps the gradient
    (0.5, -2.0, 1.4, 0.0, True),  # bad and unlikely enough
    (1.5, -2.0, 3.0, 3.0, False),  # bad and likely: keeps the gradient
    (0.8, -2.0, 1.6, 1.6, False),
    (1.5, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), CASES)
def test_clipped_loss_inside_and_outside_both_ends(ratio, advantage, loss, slope, clipped):
    old = -1.7
    logprobs = torch.tensor([old + math.log(ratio)], requires_grad=True)
    found = GRPO(GRPO.Config(clip_low=0.3, clip_high=0.2)).loss(inputs(logprobs, [old], [advantage]))
    found.loss_R.sum().backward()
    assert found.loss_R.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-6)
    assert found.metrics_R["ratio"].item() == pytest.approx(ratio, abs=1e-6)
    assert found.metrics_R["clip_fraction"].item() == float(clipped)
    assert not any(metric.requires_grad for metric in found.metrics_R.values())


def test_entropy_bonus():
    logprobs = torch.tensor([-1.0, -2.0])
    plain = GRPO().loss(inputs(logprobs, [-1.0, -2.0], [1.0, 1.0], [0.5, 0.25])).loss_R
    with_bonus = GRPO(GRPO.Config(entropy_coefficient=0.1)).loss(inputs(logprobs, [-1.0, -2.0], [1.0, 1.0], [0.5, 0.25])).loss_R
    assert (plain - with_bonus).tolist() == pytest.approx([0.05, 0.025])


def test_dr_grpo_is_an_option():
    algorithm = GRPO(build(GRPO.Config, DR_GRPO, "algorithm"))
    assert algorithm.aggregation == "fixed-length" and algorithm.fixed_length_tokens == 256
    assert algorithm.advantages(rows([0.0, 1.0]))[0][1] == -0.5
