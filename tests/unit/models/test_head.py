"""Log-probs and entropy of targets, in chunks, and a critic's value; on one rank.

Not covered: a vocabulary split over ranks (tests/distributed/test_parity.py).
"""

import pytest
import torch
import torch.distributed as dist

from megatron_agent.models.head import ValueHead, VocabularyShard, divergence, target_logprobs
from megatron_agent.types import ReferenceHead, Support


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(6, 5), 2 * torch.randn(24, 5), torch.tensor([0, 18, 5, 5, 17, 3])


def reference(hidden, weight, targets, vocab_size, temperature):
    logprobs = ((hidden @ weight.t())[:, :vocab_size] / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab_size", [24, 19])  # 19: five columns of padding
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 6])
def test_values_and_gradients_equal_log_softmax(group, rows, vocab_size, temperature, rows_per_chunk):
    hidden, weight, targets = rows
    weight[vocab_size:] *= 20  # the padding's logits are the largest
    shard = VocabularyShard(vocab_size, 0, group, chunk_bytes=rows_per_chunk * 24 * 4)
    ours, theirs = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    found = target_logprobs(*ours, targets, shard, temperature)
    expected = reference(*theirs, targets, vocab_size, temperature)
    weights = torch.randn(2, 6)
    for values in (found, expected):
        (values[0] * weights[0] + values[1] * weights[1]).sum().backward()
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    assert (ours[1].grad[vocab_size:] == 0).all() and ours[1].grad.abs().max() > 0.1


def test_banned_tokens_are_as_good_as_not_there(group, rows):
    """Also where some are columns of other ranks."""
    hidden, weight, targets = rows
    banned = (2, 7, 25)
    ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
    shard = VocabularyShard(24, 0, group, support=Support(banned))
    logprobs, entropy = target_logprobs(hidden, ours, targets, shard, 0.7)
    logits = hidden @ theirs.t() / 0.7
    logits = logits.index_fill(1, torch.tensor(banned[:2]), -torch.inf)
    expected = logits.log_softmax(-1)
    chosen = expected[torch.arange(len(targets)), targets]
    torch.testing.assert_close(logprobs, chosen, rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy(), rtol=0, atol=3e-6)
    logprobs.sum().backward()
    chosen.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert ours.grad[[2, 7]].abs().max() < 1e-20 and ours.grad.abs().max() > 0.1


def kept_by_vllm(logits, top_k, top_p):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    k = torch.full((len(logits),), min(top_k or logits.shape[1], logits.shape[1]))
    return apply_top_k_top_p_pytorch(logits.clone(), k, torch.full((len(logits),), top_p))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (100, 1.0), (0, 0.9), (0, 0.3), (0, 1e-6), (7, 0.8), (3, 0.99)]
)
@pytest.mark.parametrize("candidates", [2, 1024])  # 2: most rows need more to find the edge of top-p
def test_top_k_and_top_p_are_vllms(group, monkeypatch, top_k, top_p, candidates):
    """Values, entropy and gradients, for targets that may be sampled; a target outside keeps its own logit."""
    monkeypatch.setattr("megatron_agent.models.head.CANDIDATES", candidates)
    torch.manual_seed(1)
    hidden, weight = torch.randn(40, 5), torch.randn(24, 5)
    shard = VocabularyShard(20, 0, group, 7 * 24 * 4, Support((3,), top_k, top_p))
    ours, theirs = (weight.clone().requires_grad_() for _ in range(2))
    logits = (hidden @ theirs.t())[:, :20].index_fill(1, torch.tensor([3]), -1e9) / 0.7
    kept = torch.where(kept_by_vllm(logits.detach(), top_k, top_p).isfinite(), logits, -1e30)
    targets = torch.distributions.Categorical(logits=kept.detach()).sample()
    logprobs, entropy = target_logprobs(hidden, ours, targets, shard, 0.7)
    expected = torch.distributions.Categorical(logits=kept)
    chosen = kept.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, chosen, rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy, expected.entropy(), rtol=0, atol=3e-6)
    (logprobs.sum() + entropy.sum()).backward()
    probability = kept.softmax(-1)
    (chosen.sum() - (probability * kept.log_softmax(-1)).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    outside = kept.detach().index_fill(1, torch.tensor([3]), 0.0).argmin(-1)
    is_cut = kept.detach().gather(1, outside[:, None])[:, 0] == -1e30
    assert is_cut.any() or top_k == 100
    found, _ = target_logprobs(hidden, weight, outside, shard, 0.7)
    own = logits.detach().gather(1, outside[:, None])[:, 0]
    with_it = own - torch.logaddexp(kept.detach().logsumexp(-1), own)
    torch.testing.assert_close(found[is_cut], with_it[is_cut], rtol=1e-6, atol=3e-6)


def test_never_more_than_a_chunk_of_logits(group):
    """The largest tensor that any operation makes, forward and backward, has a chunk of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        num_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.num_elements = max(self.num_elements, tensor.numel())
            return out

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    shard = VocabularyShard(512, 0, group, chunk_bytes=16 * 512 * 4)
    with Largest() as largest:
        logprobs, entropy = target_logprobs(hidden, weight, torch.arange(64), shard)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.num_elements == 16 * 512 > weight.numel()


def test_bfloat16_weights_give_float32_logprobs(group, rows):
    hidden, weight, targets = (row.bfloat16() if row.is_floating_point() else row for row in rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, _ = target_logprobs(hidden, weight, targets, VocabularyShard(24, 0, group))
    expected = (hidden @ weight.t()).float().log_softmax(-1)[torch.arange(6), targets]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_large_logits_stay_finite(group):
    hidden = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, 1e4]], requires_grad=True)
    logprobs, entropy = target_logprobs(hidden, torch.eye(3), torch.tensor([1, 2]), VocabularyShard(3, 0, group))
    assert logprobs.tolist() == pytest.approx([-2e4, -0.6931472], rel=1e-3)
    assert entropy.tolist()[0] == pytest.approx(0, abs=1e-3)
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all()


def test_a_frozen_weight_gets_no_gradient(group, rows):
    hidden, weight, targets = rows
    hidden.requires_grad_()
    target_logprobs(hidden, weight, targets, VocabularyShard(24, 0, group))[0].sum().backward()
    assert weight.grad is None and hidden.grad.abs().max() > 0


def test_no_targets_at_all(group):
    hidden = torch.zeros(0, 8, requires_grad=True)
    logprobs, entropy = target_logprobs(
        hidden, torch.zeros(8, 8), torch.zeros(0, dtype=torch.long), VocabularyShard(8, 0, group)
    )
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()


def test_values_start_at_zero():
    head = ValueHead(4, torch.float32)
    values = head(torch.randn(3, 4))
    assert values.tolist() == [0.0, 0.0, 0.0]
    values.sum().backward()
    assert head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("vocab_size", [24, 19])
@pytest.mark.parametrize("rows_per_chunk", [4, 6])
def test_divergence_over_the_whole_vocabulary(group, rows, vocab_size, rows_per_chunk):
    """KL(policy || reference) of every row and its gradient, against two log-softmaxes."""
    hidden, weight, _ = rows
    other = ReferenceHead(torch.randn(6, 7), torch.randn(24, 7))  # another width
    shard = VocabularyShard(vocab_size, 0, group, chunk_bytes=rows_per_chunk * 24 * 4)
    ours, theirs = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    found = divergence(*ours, other, shard, 0.7)
    own = ((theirs[0] @ theirs[1].t())[:, :vocab_size] / 0.7).log_softmax(-1)
    expected = (own.exp() * (own - ((other.hidden_Rh @ other.weight.t())[:, :vocab_size] / 0.7).log_softmax(-1))).sum(-1)
    weights = torch.randn(6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    same = divergence(hidden, weight, ReferenceHead(hidden, weight), shard)
    torch.testing.assert_close(same, torch.zeros(6), rtol=0, atol=1e-6)
