"""bfloat16, frozen parts, a rate of its own for the vision tower, pictures encoded on every rank; on real ranks.

Not covered: bfloat16 on GPUs, and its distance from transformers there.
"""

import pytest
import rank_jobs_options

from megatron_agent.training.layout import Layout
from megatron_agent.types import Support

pytestmark = pytest.mark.distributed

TP2, PP2, CP2 = Layout(2), Layout(pipeline_parallel=2), Layout(context_parallel=2)


def losses_and_norms(results):
    losses = [sum(s for s, _, _ in step) / sum(n for _, n, _ in step) for step in zip(*[taken for taken, _, _ in results])]
    return losses, [norm for _, _, norm in results[0][0]]


def run(ranks, path, layout, **options):
    return ranks.run(layout.world_size, with_options, path, layout, options)


def with_options(path, layout, options):
    return rank_jobs_options.steps_with(path, layout, **options)


@pytest.mark.parametrize("frozen", ["vision", "language"])
def test_what_is_frozen_stays_and_the_rest_learns_alike_in_every_layout(ranks, tiny_models, frozen):
    expected = None
    for layout in (Layout(), TP2, PP2):
        results = run(ranks, tiny_models["tied"], layout, frozen=frozen)
        changes = {name: change for _, found, _ in results for name, change in found.items()}
        is_frozen = {name: name.startswith(frozen if frozen == "language" else "visual") for name in changes}
        assert {name for name in changes if is_frozen[name] and changes[name]} == set()
        assert all(change > 0 for name, change in changes.items() if not is_frozen[name])
        losses, norms = losses_and_norms(results)
        expected = expected or (losses, norms)
        assert losses == pytest.approx(expected[0], abs=1e-5) and norms == pytest.approx(expected[1], rel=1e-5)
        assert losses[2] < losses[0]


def test_the_vision_tower_learns_at_its_own_rate(ranks, tiny_models):
    """Adam's first step is proportional to the rate."""
    whole, half = (run(ranks, tiny_models["tied"], TP2, count=1, vision_lr_scale=scale)[0][1] for scale in (1.0, 0.5))
    ratios = {name: half[name] / whole[name] for name in whole}
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(0.5 if name.startswith("visual") else 1.0, rel=1e-3), name


@pytest.mark.parametrize("support", [Support(top_p=0.7), Support((5, 300), top_k=30, top_p=0.9)], ids=str)
def test_top_k_and_top_p_over_a_split_vocabulary(ranks, tiny_models, support):
    """And the warm start, which learns from no samples, sees all tokens."""
    ((whole, _),) = ranks.run(
        1, rank_jobs_options.logprobs_of, tiny_models["tied"], Layout(), Support(support.banned_token_ids)
    )
    ((one, entropies),) = ranks.run(1, rank_jobs_options.logprobs_of, tiny_models["tied"], Layout(), support)
    assert all(cut >= all_ - 1e-6 for i in one for cut, all_ in zip(one[i], whole[i])) and one != whole
    (split, split_entropies), _ = ranks.run(2, rank_jobs_options.logprobs_of, tiny_models["tied"], TP2, support)
    assert max(abs(a - b) for i in one for a, b in zip(one[i], split[i])) < 1e-5
    assert split_entropies == pytest.approx(entropies, rel=1e-5) and entropies[0] < 0.95 * entropies[1]


@pytest.mark.parametrize("layout", [TP2, CP2], ids=["tp2", "cp2"])
def test_pictures_encoded_on_every_rank_give_the_same_numbers(ranks, tiny_models, layout):
    shared, replicated = (run(ranks, tiny_models["tied"], layout, replicate_vision=value) for value in (False, True))
    losses, norms = losses_and_norms(shared)
    found_losses, found_norms = losses_and_norms(replicated)
    assert found_losses == pytest.approx(losses, abs=1e-5) and found_norms == pytest.approx(norms, rel=1e-5)
    imbalances = [maxima["vision_imbalance"] for _, _, maxima in shared]
    assert len(set(imbalances)) == 1 and 1.0 < imbalances[0] < 2.0  # few pictures a row: they cannot be even
    assert {maxima["vision_imbalance"] for _, _, maxima in replicated} == {1.0}


def test_bfloat16_has_float32_masters_gradients_and_moments(ranks, tiny_models):
    for found in ranks.run(2, rank_jobs_options.dtypes, tiny_models["tied"], TP2):
        assert found.pop("parameters") == ["torch.bfloat16"]
        assert found == {kind: ["torch.float32"] for kind in ("gradients", "masters", "moments")}


def test_bfloat16_learns_alike_in_every_layout_and_near_float32(ranks, tiny_models):
    exact, norms = losses_and_norms(run(ranks, tiny_models["tied"], Layout(), count=5))
    for layout in (Layout(), Layout(2, sequence_parallel=True), PP2, CP2):
        losses, found_norms = losses_and_norms(run(ranks, tiny_models["tied"], layout, count=5, dtype="bfloat16"))
        assert losses == pytest.approx(exact, abs=0.03) and found_norms == pytest.approx(norms, rel=0.05)
