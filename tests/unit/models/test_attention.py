"""packed_attention against attention written out row by row. Not covered: speed, GPUs, bfloat16."""

import pytest
import torch

from megatron_agent.models.attention import packed_attention


def naive(q, k, v, bounds, causal, scale):
    """One query at a time, in plain sums."""
    out = torch.zeros_like(q)
    heads_per_group = q.shape[1] // k.shape[1]
    rows = []
    for t in range(q.shape[0]):
        start, stop = next((a, b) for a, b in zip(bounds, bounds[1:]) if a <= t < b)
        stop = t + 1 if causal else stop
        heads = []
        for h in range(q.shape[1]):
            g = h // heads_per_group
            weights = torch.softmax(k[start:stop, g] @ q[t, h] * scale, 0)
            heads.append(weights @ v[start:stop, g])
        rows.append(torch.stack(heads))
    assert len(rows) == len(out)
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "lengths",
    [[5], [3, 3, 3], [4, 1, 7], [2, 5, 2, 5, 1], [1, 1]],
    ids=["one", "equal", "mixed", "two lengths alternating", "single tokens"],
)
def test_equals_naive_attention_and_its_gradients(lengths, heads, groups, causal):
    torch.manual_seed(0)
    total, dim = sum(lengths), 8
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    inputs = [torch.randn(total, n, dim, dtype=torch.float64, requires_grad=True) for n in (heads, groups, groups)]
    weights = torch.randn(total, heads, dim, dtype=torch.float64)
    ours = packed_attention(*inputs, bounds, causal=causal)
    theirs = naive(*inputs, bounds, causal, dim**-0.5)
    assert ours.shape == (total, heads, dim)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((theirs * weights).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_scale_and_empty_segments():
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 4, dtype=torch.float64) for _ in range(3))
    ours = packed_attention(q, k, v, [0, 2, 2, 5], causal=True, scale=0.25)
    torch.testing.assert_close(ours, naive(q, k, v, [0, 2, 5], True, 0.25), rtol=0, atol=1e-12)


def test_a_segment_sees_nothing_of_its_neighbours():
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, 4) for _ in range(3))
    before = packed_attention(q, k, v, [0, 2, 6], causal=False)
    k[2:], v[2:] = 100.0, -100.0
    assert torch.equal(packed_attention(q, k, v, [0, 2, 6], causal=False)[:2], before[:2])
