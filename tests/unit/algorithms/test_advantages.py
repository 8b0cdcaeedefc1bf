"""Advantages of every algorithm against numbers worked out by hand or by an independent sum, on rows with observations in
the middle, groups of unequal size, a group of one and a member that is masked. GRPO's: test_grpo.py.

Unscored members never reach an algorithm: tests/unit/training/test_samples.py.
"""

import math

import numpy as np
import pytest

from megatron_agent import registry
from megatron_agent.algorithms.advantages import gae, returns_to_go, token_rewards, whitened
from megatron_agent.options import build
from megatron_agent.types import TrainSample

# prompt, actions, an observation, actions, the last observation; a row of one action; one that is masked
LONG = [False, False, True, True, False, False, True, False]
SHORT = [False, True]
MASKED = [False, False, False]


def row(mask, group, reward, process=(), values=(), old=(), reference=(), baseline=None):
    def at_actions(numbers):
        of_actions = iter(numbers)
        return [next(of_actions) if own else 0.0 for own in mask] if len(numbers) else [0.0] * len(mask)

    return TrainSample(
        [1] * len(mask), mask, [0.0] * len(mask), [0.0] * len(mask), [], group, reward,
        process_rewards_T=at_actions(process), values_T=at_actions(values), baseline_reward=baseline,
        old_logprobs_T=at_actions(old), reference_logprobs_T=at_actions(reference),
    )  # fmt: skip


def batch():
    """Group a: 1, 0, 0.5 (masked); b: 2 alone; c: 1, 1. Six action tokens and two."""
    return [
        row(LONG, "a", 1.0, baseline=0.25),
        row(SHORT, "c", 1.0, baseline=1.0),
        row(SHORT, "a", 0.0, baseline=0.25),
        row(MASKED, "a", 0.5, baseline=0.25),
        row(LONG, "b", 2.0, baseline=None),
        row(SHORT, "c", 1.0, baseline=1.0),
    ]


def make(name, **options):
    component = registry.resolve("algorithms", name)
    return component(build(component.Config, options, "algorithm"))


def per_action(algorithm, samples):
    """The actions' advantages of every row, after a look at the others: all 0."""
    found = algorithm.advantages(samples)
    for values, sample in zip(found, samples, strict=True):
        assert all(value == 0.0 for value, own in zip(values, sample.action_mask_T, strict=True) if not own)
    return [[v for v, own in zip(values, s.action_mask_T) if own] for values, s in zip(found, samples)]


def approx(expected):
    return [pytest.approx(values, abs=1e-12) for values in expected]


def test_rloo_compares_with_the_mean_of_the_others():
    expected = [[0.75] * 3, [0.0], [-0.75], [], [0.0] * 3, [0.0]]  # 1 - (0 + 0.5) / 2; 0 - (1 + 0.5) / 2
    assert per_action(make("rloo"), batch()) == approx(expected)


def test_remax_compares_with_the_greedy_trajectory():
    expected = [[0.75] * 3, [0.0], [-0.25], [], [0.0] * 3, [0.0]]
    assert per_action(make("remax"), batch()) == approx(expected)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo"])
def test_group_normalised_with_unbiased_std(name):
    expected = [[1.0] * 3, [0.0], [-1.0], [], [0.0] * 3, [0.0]]  # of 1, 0, 0.5: mean 0.5, std 0.5
    assert per_action(make(name), batch()) == approx(expected)


def test_gpg_makes_up_for_groups_that_teach_nothing():
    """Three of the six trajectories are in groups of equal rewards: the others count twice."""
    assert per_action(make("gpg"), batch()) == approx([[1.0] * 3, [0.0], [-1.0], [], [0.0] * 3, [0.0]])
    normalised = [[2.0] * 3, [0.0], [-2.0], [], [0.0] * 3, [0.0]]
    assert per_action(make("gpg", normalise_std=True), batch()) == approx(normalised)


def test_reinforce_plus_plus_whitens_returns_over_all_action_tokens():
    returns = [[1.0] * 3, [1.0], [0.0], [], [2.0] * 3, [1.0]]
    flat = [1, 1, 1, 1, 0, 2, 2, 2, 1]
    mean, std = sum(flat) / 9, math.sqrt(sum((x - sum(flat) / 9) ** 2 for x in flat) / 9)
    expected = [[(x - mean) / std for x in values] for values in returns]
    assert per_action(make("reinforce_plus_plus"), batch()) == approx(expected)
    discounted = returns_to_go(np.array([0.0, 0.0, 1.0]), 0.5)
    assert discounted.tolist() == [0.25, 0.5, 1.0]


def test_reinforce_plus_plus_baseline_whitens_what_the_groups_mean_leaves():
    flat = [0.5] * 3 + [0] + [-0.5] + [0] * 4
    mean, std = sum(flat) / 9, np.std(flat)
    expected = [[(x - mean) / std for x in values] for values in ([0.5] * 3, [0], [-0.5], [], [0] * 3, [0])]
    assert per_action(make("reinforce_plus_plus_baseline"), batch()) == approx(expected)


def test_process_rewards_sit_at_the_ends_of_turns_and_the_outcome_at_the_last():
    sample = row(LONG, "a", 1.3, process=[0.0, 0.2, 0.1])
    assert token_rewards(sample).tolist() == pytest.approx([0.0, 0.2, 1.1])
    assert token_rewards(row(MASKED, "a", 1.0)).tolist() == []
    credited = per_action(make("reinforce_plus_plus"), [sample, row(SHORT, "b", 0.0)])
    returns = np.array([1.3, 1.3, 1.1, 0.0])
    whole = (returns - returns.mean()) / returns.std()
    assert credited == approx([whole[:3].tolist(), whole[3:].tolist()])


def gae_by_its_sum(rewards, values, discount, trace):
    """Equation 16 as it stands: sum over l of (discount trace)^l delta_(t + l)."""
    values = [*values, 0.0]
    delta = [r + discount * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((discount * trace) ** (s - t) * delta[s] for s in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 0.5)])
def test_ppo_passes_credit_over_observations(discount, trace):
    samples = [
        row(LONG, "a", 1.3, process=[0.0, 0.2, 0.1], values=[0.5, -0.25, 0.75]),
        row(SHORT, "a", -1.0, values=[0.5]),
        row(MASKED, "a", 1.0),
    ]
    algorithm = make("ppo", discount=discount, gae_lambda=trace, whiten=False)
    first = gae_by_its_sum([0.0, 0.2, 1.1], [0.5, -0.25, 0.75], discount, trace)
    assert per_action(algorithm, samples) == approx([first, [-1.5], []])
    returns = algorithm.returns(samples)
    assert returns[0] == pytest.approx([0, 0, first[0] + 0.5, first[1] - 0.25, 0, 0, first[2] + 0.75, 0])
    assert returns[1:] == [[0.0, -1.0], [0.0] * 3]
    flat = np.array([*first, -1.5])
    white = (flat - flat.mean()) / flat.std()
    whitened_ = per_action(make("ppo", discount=discount, gae_lambda=trace), samples)
    assert whitened_ == approx([white[:3].tolist(), white[3:].tolist(), []])


def test_with_traces_of_one_gae_is_return_less_value():
    rewards, values = np.array([0.1, 0.0, 2.0, -1.0]), np.array([0.3, 0.2, -0.4, 1.0])
    np.testing.assert_allclose(gae(rewards, values, 1.0, 1.0), np.cumsum(rewards[::-1])[::-1] - values, atol=1e-12)


def test_equal_advantages_whiten_to_nothing():
    assert [values.tolist() for values in whitened([np.array([0.1, 0.1]), np.array([0.1])])] == [[0, 0], [0]]
    assert whitened([]) == [] and whitened([np.zeros(0)])[0].size == 0


def test_ppo_without_a_critics_values_says_so():
    sample = row(SHORT, "a", 1.0)
    sample.values_T = None
    with pytest.raises(ValueError, match="let the critic fill them"):
        make("ppo").advantages([sample])


KL_IN_REWARD = {"kl": {"coefficient": 0.5, "where": "reward", "estimator": "k1"}}


def test_kl_comes_off_the_reward_of_every_token():
    """log ratios 0.2, 0, -0.4 and 0.6: rewards -0.1, 0, 1.2 and -0.3."""
    samples = [
        row(LONG, "a", 1.0, old=[-1.0, -2.0, -1.4], reference=[-1.2, -2.0, -1.0]),
        row(SHORT, "a", 0.0, old=[-1.0], reference=[-1.6]),
    ]
    algorithm = make("reinforce_plus_plus", **KL_IN_REWARD)
    assert algorithm.needs_reference and algorithm.needs_old_logprobs
    flat = np.array([1.1, 1.2, 1.2, -0.3])
    white = (flat - flat.mean()) / flat.std()
    assert per_action(algorithm, samples) == approx([white[:3].tolist(), white[3:].tolist()])
    assert per_action(make("rloo", **KL_IN_REWARD), samples) == approx([[1.4] * 3, [-1.4]])  # 1.1 and -0.3
    samples[0].old_logprobs_T = None
    with pytest.raises(ValueError, match="fill old_logprobs_T"):
        algorithm.advantages(samples)


def test_dapo_shapes_long_answers():
    """Answers of 1 and 3 tokens, at most 4 with a cache of 2: the second loses 0.5."""
    algorithm = make("dapo", overlong_max_tokens=4, overlong_cache_tokens=2)
    assert [algorithm.overlong_penalty(n) for n in (0, 2, 3, 4, 9)] == [0, 0, -0.5, -1, -1]
    samples = [row(LONG, "a", 1.0), row(SHORT, "a", 1.0)]
    assert per_action(algorithm, samples) == approx([[-math.sqrt(0.5)] * 3, [math.sqrt(0.5)]])
    assert per_action(make("dapo"), samples) == [[0.0] * 3, [0.0]]


def test_dapo_refuses_groups_of_equal_rewards_and_asks_for_others():
    algorithm = make("dapo")
    assert algorithm.max_sampling_rounds == 10
    different, equal = [row(SHORT, "a", 1.0), row(SHORT, "a", 0.0)], [row(SHORT, "a", 1.0), row(SHORT, "a", 1.0)]
    assert algorithm.keep_group(different) and not algorithm.keep_group(equal) and not algorithm.keep_group([])
    assert not algorithm.keep_group(different[:1])
    static = make("dapo", dynamic_sampling=False)
    assert static.keep_group(equal) and static.max_sampling_rounds == 1
    assert make("grpo").keep_group(equal)


def test_distillation_adds_the_reward_only_if_asked():
    assert per_action(make("distillation"), batch()) == [[0.0] * 3, [0.0], [0.0], [], [0.0] * 3, [0.0]]
    found = per_action(make("distillation", reward_coefficient=0.5), batch())
    assert found == approx([[0.5] * 3, [0.0], [-0.5], [], [0.0] * 3, [0.0]])
