"""Losses against independent formulas: values in float64, gradients by finite differences on a tiny model.

A policy of 3 states and 4 tokens, three trajectories of 3, 1 and 2 action tokens.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_agent import registry
from megatron_agent.algorithms.divergence import kl_estimate, next_coefficient
from megatron_agent.algorithms.objectives import clipped_ratio_loss, importance_weights
from megatron_agent.algorithms.options import ImportanceOptions, KLOptions
from megatron_agent.options import build
from megatron_agent.training.loss import aggregation_weights
from megatron_agent.types import BatchSize, LossInputs

STATES, TOKENS = torch.tensor([0, 1, 2, 0, 2, 1]), torch.tensor([3, 0, 1, 1, 2, 2])
SAMPLE = torch.tensor([0, 0, 0, 1, 2, 2])
LENGTHS = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([0.7, 0.7, 0.7, -1.2, 0.4, 0.4], dtype=torch.float64)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs_of(logits):
    return logits.log_softmax(-1)[STATES, TOKENS]


LOGITS = draw(0, 3, 4)
OLD = logprobs_of(LOGITS) - torch.tensor([0.6, 1.05, 1.4, 0.7, 1.3, 0.95], dtype=torch.float64).log()  # the ratios
ROLLOUT = OLD + 0.5 * draw(2, 6)
REFERENCE_LOGITS = LOGITS + draw(3, 3, 4)


def make(name, **options):
    component = registry.resolve("algorithms", name)
    return component(build(component.Config, options, "algorithm"))


def inputs(logits, **more):
    distribution = logits.log_softmax(-1)[STATES]
    return LossInputs(
        logprobs_R=logprobs_of(logits), old_logprobs_R=OLD, rollout_logprobs_R=ROLLOUT, advantages_R=ADVANTAGES,
        sample_index_R=SAMPLE, num_samples=3, entropy_R=-(distribution.exp() * distribution).sum(-1),
        reference_logprobs_R=logprobs_of(REFERENCE_LOGITS), lag_R=torch.tensor([0, 0, 1, 2, 0, 0]), **more,
    )  # fmt: skip


def ours(algorithm, logits, **more):
    batch = inputs(logits, **more)
    size = BatchSize(6, 3)
    return (algorithm.loss(batch).loss_R * aggregation_weights(algorithm, batch, size)).sum() / size.num_tokens


def check(algorithm, expected, **more):
    """Value and gradient: `expected(log-probs)` is differentiated by differences."""
    logits = LOGITS.clone().requires_grad_()
    loss = ours(algorithm, logits, **more)
    loss.backward()
    assert float(loss) == pytest.approx(float(expected(LOGITS)), abs=1e-12)
    step = 1e-5
    for index in range(LOGITS.numel()):
        moved = torch.zeros(LOGITS.numel(), dtype=torch.float64)
        moved[index] = step
        moved = moved.view_as(LOGITS)
        slope = float(expected(LOGITS + moved) - expected(LOGITS - moved)) / (2 * step)
        assert logits.grad.view(-1)[index].item() == pytest.approx(slope, abs=1e-8), index


def pessimist(ratio, advantage, low, high):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def token_terms(logits, low=0.2, high=0.2, advantages=ADVANTAGES, old=OLD):
    ratios = (logprobs_of(logits) - old).exp()
    return [pessimist(r, a, low, high) for r, a in zip(ratios.tolist(), advantages.tolist())]


CLIPPED = ("grpo", "rloo", "ppo", "remax", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_ratio(name):
    check(make(name), lambda logits: sum(token_terms(logits)) / 6)


def test_dapo_clips_higher_above():
    check(make("dapo"), lambda logits: sum(token_terms(logits, 0.2, 0.28)) / 6)


AGGREGATES = {
    "token-mean": (0, lambda terms: sum(terms) / 6),
    "sequence-mean": (0, lambda terms: (sum(terms[:3]) / 3 + terms[3] + sum(terms[4:]) / 2) / 3),
    "sequence-sum": (0, lambda terms: sum(terms) / 3),
    "fixed-length": (50, lambda terms: sum(terms) / 50 / 3),
}


@pytest.mark.parametrize("kind", AGGREGATES)
def test_aggregation(kind):
    length, aggregate = AGGREGATES[kind]
    algorithm = make("grpo", aggregation=kind, fixed_length_tokens=length)
    check(algorithm, lambda logits: aggregate(token_terms(logits)))


@pytest.mark.parametrize("clip", [3e-4, 0.02, 0.35])
def test_gspo_is_of_whole_sequences(clip):
    def expected(logits):
        log_ratios = (logprobs_of(logits) - OLD).split([3, 1, 2])
        ratios = [math.exp(float(part.mean())) for part in log_ratios]
        return sum(pessimist(r, a, clip, clip) for r, a in zip(ratios, [0.7, -1.2, 0.4])) / 3

    check(make("gspo", clip_low=clip, clip_high=clip), expected)


def test_cispo_weighs_log_probs_by_clipped_ratios_that_have_no_gradient():
    weights = (logprobs_of(LOGITS) - OLD).exp().clamp(max=1.1)
    assert (weights == 1.1).any() and (weights < 0.9).any()
    check(make("cispo", clip_high=0.1), lambda logits: -(weights * ADVANTAGES * logprobs_of(logits)).sum() / 6)


def test_gpg_is_plain_reinforce():
    check(make("gpg"), lambda logits: -(ADVANTAGES * logprobs_of(logits)).sum() / 6)


def test_distillation_has_the_gradient_of_the_reverse_kl():
    """At the old policy, in expectation over the student's tokens: of sum_v p (log p - log q) of a state."""
    preference = logprobs_of(REFERENCE_LOGITS) - OLD
    total = ADVANTAGES + 0.5 * preference
    check(make("distillation", teacher_coefficient=0.5), lambda logits: sum(token_terms(logits, advantages=total)) / 6)
    student = draw(7, 4).requires_grad_()
    teacher = draw(8, 4).log_softmax(-1)
    own = student.log_softmax(-1)
    (exact,) = torch.autograd.grad((own.exp() * (own - teacher)).sum(), student, retain_graph=True)
    zeros = torch.zeros(4, dtype=torch.float64)
    batch = LossInputs(own, own.detach(), own.detach(), zeros, torch.arange(4), 4, reference_logprobs_R=teacher)
    expectation = (own.detach().exp() * make("distillation").loss(batch).loss_R).sum()
    (found,) = torch.autograd.grad(expectation, student)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_dual_clip_bounds_what_a_bad_token_costs():
    ratio = torch.tensor([5.0, 5.0, 2.0, 0.5])
    loss, clipped = clipped_ratio_loss(ratio, torch.tensor([-1.0, 1.0, -1.0, -1.0]), 0.2, 0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.2, 2.0, 0.8]) and clipped.tolist() == [True, True, False, True]


def test_the_two_clip_ends_are_not_swapped():
    loss, clipped = clipped_ratio_loss(torch.tensor([0.75, 1.25]), torch.tensor([-1.0, 1.0]), clip_low=0.1, clip_high=0.4)
    assert loss.tolist() == pytest.approx([0.9, -1.25]) and clipped.tolist() == [True, False]


KL = {
    "k1": lambda own, other: own - other,
    "abs": lambda own, other: (own - other).abs(),
    "k2": lambda own, other: (own - other) ** 2 / 2,
    "k3": lambda own, other: other.exp() / own.exp() - 1 - (other - own),
    "low_variance": lambda own, other: other.exp() / own.exp() - 1 - (other - own),
}


@pytest.mark.parametrize("estimator", KL)
def test_kl_and_entropy_in_the_loss(estimator):
    def expected(logits):
        kl = KL[estimator](logprobs_of(logits), logprobs_of(REFERENCE_LOGITS))
        distribution = logits.softmax(-1)[STATES]
        return (sum(token_terms(logits)) + (0.3 * kl + 0.1 * (distribution * distribution.log()).sum(-1)).sum()) / 6

    check(make("grpo", kl={"coefficient": 0.3, "estimator": estimator}, entropy_coefficient=0.1), expected)


def test_full_kl_is_what_the_trainer_gives():
    algorithm = make("grpo", kl={"coefficient": 0.3, "estimator": "full"})
    assert algorithm.needs_full_kl
    logits = LOGITS.clone().requires_grad_()
    own, other = logits.log_softmax(-1)[STATES], REFERENCE_LOGITS.log_softmax(-1)[STATES]
    loss = ours(algorithm, logits, full_kl_R=(own.exp() * (own - other)).sum(-1))
    kl = float((own.exp() * (own - other)).sum())
    assert float(loss) == pytest.approx((sum(token_terms(LOGITS)) + 0.3 * kl) / 6, abs=1e-12)
    with pytest.raises(ValueError, match="needs full_kl_R"):
        ours(algorithm, LOGITS)


def test_kl_estimators_in_expectation():
    """k1 and k3 are unbiased for any pair of distributions, k2's gradient is that of the KL at any."""
    own, other = draw(5, 50).log_softmax(-1), draw(6, 50).log_softmax(-1)
    exact = float((own.exp() * (own - other)).sum())
    for estimator in ("k1", "k3"):
        assert float((own.exp() * kl_estimate(own - other, estimator)).sum()) == pytest.approx(exact, abs=1e-12)
    logits = draw(5, 50).requires_grad_()
    log_p = logits.log_softmax(-1)
    (exact_gradient,) = torch.autograd.grad((log_p.exp() * (log_p - other)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((log_p.detach().exp() * kl_estimate(log_p - other, "k2")).sum(), logits)
    torch.testing.assert_close(found, exact_gradient, rtol=0, atol=1e-12)


def test_estimators_stay_finite_where_the_policies_part():
    far = torch.tensor([-500.0, 500.0, 0.0], dtype=torch.float64)
    assert all(kl_estimate(far, name).isfinite().all() for name in KL)
    assert kl_estimate(far, "low_variance").tolist() == [10.0, 10.0, 0.0]
    for estimator in KL:
        as_array = kl_estimate(far.numpy(), estimator)
        assert as_array.tolist() == pytest.approx(kl_estimate(far, estimator).tolist())


def test_the_controller_follows_its_target():
    options = KLOptions(coefficient=0.2, target=0.1, horizon_trajectories=100)
    assert next_coefficient(options, 0.2, 0.11, 50) == pytest.approx(0.2 * (1 + 0.1 * 0.5))
    assert next_coefficient(options, 0.2, 9.0, 50) == pytest.approx(0.2 * (1 + 0.2 * 0.5))
    assert next_coefficient(options, 0.2, 0.0, 50) == pytest.approx(0.2 * (1 - 0.2 * 0.5))
    assert next_coefficient(options, 0.2, 9.0, 1000) == pytest.approx(0.2 * 1.2)
    assert next_coefficient(KLOptions(coefficient=0.2), 0.2, 9.0, 50) == 0.2
    algorithm = make("grpo", kl={"coefficient": 0.2, "target": 0.1, "horizon_trajectories": 100})
    algorithm.end_step({"kl": 0.2}, 100)
    again = make("grpo", kl={"coefficient": 0.2, "target": 0.1})
    again.load_state(algorithm.state())
    assert again.kl_coefficient == algorithm.kl_coefficient == pytest.approx(0.24)
    assert make("grpo").state() == {}


LOG_W = [0.1, -0.3, 1.0, -2.0, 0.9, 0.3]  # old - rollout; by sequence: 0.8, -2.0, 1.2
W = [math.exp(x) for x in LOG_W]
PER_SEQUENCE = [math.exp(x) for x in (0.8, 0.8, 0.8, -2.0, 1.2, 1.2)]
MEANS = [math.exp(x) for x in (0.8 / 3, 0.8 / 3, 0.8 / 3, -2.0, 0.6, 0.6)]
CORRECTIONS = {
    "truncate": ({"correction": "truncate"}, [W[0], W[1], 2.0, W[3], 2.0, W[5]], [2, 4]),
    "mask": ({"correction": "mask"}, [W[0], W[1], 0.0, 0.0, 0.0, W[5]], [2, 3, 4]),
    "sequence": ({"correction": "truncate", "level": "sequence"}, [min(2.0, w) for w in PER_SEQUENCE], [0, 1, 2, 4, 5]),
    "geometric": ({"correction": "mask", "level": "geometric"}, [*MEANS[:3], 0.0, *MEANS[4:]], [3]),
    "stale tokens": ({"correction": "truncate", "stale_only": True}, [1.0, 1.0, 2.0, W[3], 1.0, 1.0], [2]),
    "too old": ({"max_lag": 0}, [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [2, 3]),
    "both": ({"correction": "truncate", "max_lag": 1}, [W[0], W[1], 2.0, 0.0, 2.0, W[5]], [2, 3, 4]),
}


@pytest.mark.parametrize("case", CORRECTIONS)
def test_importance_weights(case):
    options, weights, changed = CORRECTIONS[case]
    old = torch.zeros(6, dtype=torch.float64)
    rollout = -torch.tensor(LOG_W, dtype=torch.float64)
    lag = torch.tensor([0, 0, 1, 2, 0, 0])
    batch = LossInputs(old, old, rollout, old, SAMPLE, 3, lag_R=lag)
    found, cut = importance_weights(batch, ImportanceOptions(**options))
    assert found.tolist() == pytest.approx(weights)
    assert cut.nonzero()[:, 0].tolist() == changed


def test_importance_weights_scale_the_policys_loss_and_not_the_kl():
    weights = (OLD - ROLLOUT).exp().clamp(max=1.2)

    def expected(logits):
        kl = (logprobs_of(logits) - logprobs_of(REFERENCE_LOGITS)) ** 2 / 2
        return (sum(w * t for w, t in zip(weights.tolist(), token_terms(logits))) + 0.3 * float(kl.sum())) / 6

    options = {"importance": {"correction": "truncate", "high": 1.2}, "kl": {"coefficient": 0.3, "estimator": "k2"}}
    check(make("grpo", **options), expected)


LAST_TWO_VERSIONS_OLD = torch.where(torch.tensor([0, 0, 1, 2, 0, 0]) > 0, ROLLOUT, OLD)


@pytest.mark.parametrize(("more", "old"), [({}, ROLLOUT), ({"stale_only": True}, LAST_TWO_VERSIONS_OLD)])
def test_the_ratio_to_what_the_engine_sampled_with(more, old):
    check(make("grpo", importance={"correction": "clip", **more}), lambda logits: sum(token_terms(logits, old=old)) / 6)


def test_clipped_against_the_engine_the_oldest_still_count_for_nothing():
    def expected(logits):
        terms = token_terms(logits, old=ROLLOUT)
        return (sum(terms) - terms[3]) / 6

    check(make("grpo", importance={"correction": "clip", "max_lag": 1}), expected)


def test_distillation_clipped_against_the_engine_still_teaches_the_current_student():
    total = ADVANTAGES + 0.5 * (logprobs_of(REFERENCE_LOGITS) - OLD)
    algorithm = make("distillation", teacher_coefficient=0.5, importance={"correction": "clip"})
    check(algorithm, lambda logits: sum(token_terms(logits, advantages=total, old=ROLLOUT)) / 6)


def test_a_token_that_was_pushed_out_of_the_clip_range_by_later_updates_gets_no_gradient():
    """What `truncate` does not give: at the weights before the update, where its own ratio is 1."""
    now = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    sampled = torch.tensor([-0.4, 0.4], dtype=torch.float64)  # ratios 1.49, 0.67
    batch = LossInputs(now, now.detach(), sampled, torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), 1)
    gradients = {}
    for kind in ("truncate", "clip"):
        gradients[kind] = torch.autograd.grad(make("grpo", importance={"correction": kind}).loss(batch).loss_R.sum(), now)[0]
    assert gradients["clip"].tolist() == [0.0, 0.0] and gradients["truncate"].tolist() == pytest.approx(
        [-math.exp(0.4), math.exp(-0.4)]
    )


def test_an_aggregation_that_is_none():
    with pytest.raises(ValueError, match="aggregation='mean'"):
        aggregation_weights(SimpleNamespace(aggregation="mean"), inputs(LOGITS), BatchSize(6, 3))
