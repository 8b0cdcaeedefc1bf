"""Masks, denominators and statistics of losses on one rank."""

from types import SimpleNamespace

import pytest
import torch

from megatron_agent.algorithms.grpo import GRPO
from megatron_agent.training.loss import LossStats, PolicyOutput, Supervised, add_gap, microbatch_loss
from megatron_agent.types import BatchSize, MicroBatch, TrainSample


def loss_of(logprobs, entropy, batch, algorithm, num_tokens, stats):
    return microbatch_loss(PolicyOutput(logprobs, entropy), batch, algorithm, BatchSize(num_tokens, 1), stats)


def batch_of(logprobs, rollout, advantages, old=None, after_image=None, samples=None):
    num = len(logprobs)
    index = torch.tensor(samples or [0] * num)
    return MicroBatch(
        token_ids_T=torch.zeros(0), position_ids_3T=torch.zeros(3, 0), cu_seqlens=torch.zeros(1), sample_index_R=index,
        target_positions_R=torch.zeros(num), target_ids_R=torch.zeros(num), advantages_R=torch.tensor(advantages),
        rollout_logprobs_R=torch.tensor(rollout), old_logprobs_R=None if old is None else torch.tensor(old),
        after_image_R=torch.tensor(after_image or [False] * num), patches_NP=None, grids_I3=None,
        sample_ids=list(range(int(index.max()) + 1)),
    )  # fmt: skip


@pytest.mark.parametrize("bounds", [[0, 12], [0, 1, 12], [0, 5, 6, 7, 12], list(range(13))])
def test_shares_add_up_to_the_token_mean_for_any_split(bounds):
    torch.manual_seed(2)
    values, advantages, old = -torch.rand(12) - 0.1, torch.randn(12), -torch.rand(12) - 0.1
    whole = values.clone().requires_grad_()
    ratio = (whole - old).exp()
    mean = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    mean.backward()
    total, grads, stats = 0.0, [], LossStats()
    for a, b in zip(bounds, bounds[1:]):
        part = values[a:b].clone().requires_grad_()
        batch = batch_of(part, values[a:b].tolist(), advantages[a:b].tolist(), old[a:b].tolist())
        mine = LossStats()
        share = loss_of(part, torch.ones(b - a), batch, GRPO(), 12, mine)
        share.backward()
        total += share.item()
        grads.append(part.grad)
        stats.merge(mine)
    assert total == pytest.approx(mean.item(), abs=1e-6)
    torch.testing.assert_close(torch.cat(grads), whole.grad, rtol=0, atol=1e-7)
    assert stats.num_tokens == 12 and stats.means()["loss"] == pytest.approx(mean.item(), abs=1e-6)
    assert stats.means()["entropy"] == 1.0


def test_without_old_logprobs_the_ratio_is_one():
    stats = LossStats()
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = loss_of(logprobs, torch.zeros(2), batch_of(logprobs, [-5.0, -5.0], [1.0, -3.0]), GRPO(), 4, stats)
    loss.backward()
    assert loss.item() == pytest.approx((-1 + 3) / 4) and logprobs.grad.tolist() == [-0.25, 0.75]
    assert stats.means()["ratio"] == stats.means()["ratio_max"] == 1.0 and stats.means()["clip_fraction"] == 0.0


def test_supervised_is_cross_entropy_of_the_action_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -4.5])
    stats = LossStats()
    loss = loss_of(logprobs, torch.zeros(3), batch_of(logprobs, [0.0] * 3, [9.0] * 3), Supervised(), 3, stats)
    assert loss.item() == pytest.approx(2.5) and stats.means()["loss"] == pytest.approx(2.5)
    row = TrainSample([1, 2, 3], [False, True, True], [0.0] * 3, [0.0] * 3, [])
    assert Supervised().advantages([row]) == [[0.0, 1.0, 1.0]]


def test_the_gap_is_the_trainers_before_the_update_against_vllms():
    stats = LossStats()
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    rollout, after = [-1.5, -2.0, -3.0, -4.25], [False, False, True, True]
    loss_of(logprobs, torch.zeros(4), batch_of(logprobs, rollout, [0.0] * 4, after_image=after), GRPO(), 4, stats)
    means = stats.means()
    assert means["logprob_gap_mean"] == pytest.approx(0.75 / 4) and means["logprob_gap_max"] == 0.5
    assert means["logprob_gap_mean/before_image"] == 0.25 and means["logprob_gap_mean/after_image"] == 0.125
    stats = LossStats()  # after a first mini-batch the weights have moved: only the old log-probs say what the gap was
    loss_of(logprobs - 1, torch.zeros(4), batch_of(logprobs, rollout, [0.0] * 4, old=rollout), GRPO(), 4, stats)
    assert stats.means()["logprob_gap_max"] == 0.0 and "logprob_gap_mean/after_image" not in stats.means()


def test_tokens_of_older_weights_are_no_gap_but_drift():
    batch = SimpleNamespace(
        rollout_logprobs_R=torch.tensor([-1.0, -2.0, -3.0]), after_image_R=torch.tensor([False, True, True]),
        lag_R=torch.tensor([0, 1, 2]),
    )  # fmt: skip
    stats = LossStats()
    add_gap(stats, torch.tensor([-1.25, -3.0, -5.0]), batch)
    means = stats.means()
    assert (means["logprob_gap_mean"], means["logprob_gap_max"], means["logprob_drift_mean"]) == (0.25, 0.25, 1.5)
    stats, batch.lag_R = LossStats(), torch.tensor([1, 1, 1])
    add_gap(stats, torch.tensor([-1.25, -3.0, -5.0]), batch)
    assert stats.means().keys() == {"logprob_drift_mean"}  # nothing says how far the engines are: no zero is shown for it


def test_statistics_merge_by_tokens_not_by_batches():
    a, b = LossStats(), LossStats()
    a.num_tokens, b.num_tokens = 3, 1
    a.add("x", torch.tensor([1.0, 2.0, 3.0]))
    a.maximum("m", torch.tensor([1.0, 4.0]))
    b.add("x", torch.tensor([10.0]))
    b.add("y", torch.tensor([5.0]))
    b.maximum("m", torch.tensor([2.0]))
    b.maximum("none", torch.tensor([]))
    a.merge(b)
    assert a.means() == {"x": 4.0, "y": 5.0, "m": 4.0} and a.num_tokens == 4
