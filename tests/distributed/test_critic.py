"""A critic on real ranks: values against transformers' hidden states, every layout against one rank, and its start.

Not covered: a whole PPO run.
"""

import pytest
import rank_jobs
import rank_jobs_critic
import torch

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.critic import ValueObjective, explained_variance
from megatron_agent.training.layout import Layout
from megatron_agent.types import BatchSize

pytestmark = pytest.mark.distributed
LAYOUTS = {
    "one": Layout(),
    "tp2sp": Layout(2, sequence_parallel=True),
    "pp2": Layout(pipeline_parallel=2),
    "cp2": Layout(context_parallel=2),
    "dp2": Layout(data_parallel=2),
}


@pytest.fixture(scope="module")
def runs(ranks, tiny_models):
    return {
        name: ranks.run(layout.world_size, rank_jobs_critic.values_and_steps, tiny_models["tied"], layout, 4)
        for name, layout in LAYOUTS.items()
    }


def merged(found):
    rows = {index: values for of_rank in found for index, values in of_rank.items()}
    return [rows[index] for index in sorted(rows)]


def expected_values(path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    family = Qwen2_5_VL(path)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    weight = rank_jobs_critic.value_weight(family.text.hidden_size)
    rows = []
    for sample in rank_jobs.make_samples(family):
        row, options = torch.tensor([sample.token_ids_T]), {}
        if sample.images:
            options["pixel_values"] = torch.cat([torch.from_numpy(family.patches(rank_jobs.pixels(r))) for r in sample.images])
            options["image_grid_thw"] = torch.tensor([family.grid(ref) for ref in sample.images])
        with torch.no_grad():
            hidden = model.model(
                input_ids=row, mm_token_type_ids=(row == family.image_token_id).int(), **options
            ).last_hidden_state[0]
        rows.append([float(hidden[t - 1] @ weight[0]) for t, own in enumerate(sample.action_mask_T) if own])
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_the_head_over_transformers_hidden_states(runs, tiny_models, layout):
    at_start, values = (merged(results[i] for results in runs[layout]) for i in (0, 1))
    assert all(value == 0 for row in at_start for value in row)
    for found, expected in zip(values, expected_values(tiny_models["tied"]), strict=True):
        assert found == pytest.approx(expected, abs=2e-5, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_one_rank(runs, layout):
    def losses_and_norms(name):
        steps = list(zip(*[results[2] for results in runs[name]]))
        losses = [sum(s.get("loss", 0) for s, _, _ in step) / sum(n for _, n, _ in step) for step in steps]
        return losses, [step[0][2] for step in steps]

    losses, norms = losses_and_norms(layout)
    expected_losses, expected_norms = losses_and_norms("one")
    assert losses == pytest.approx(expected_losses, rel=2e-5) and norms == pytest.approx(expected_norms, rel=2e-5)
    assert losses[3] < 0.9 * losses[0]


def test_a_critic_starts_from_a_trained_policy_in_another_layout(ranks, tiny_models, tmp_path):
    tp2, pp2 = LAYOUTS["tp2sp"], LAYOUTS["pp2"]
    for tied in ("tied", "untied"):
        arguments = (tiny_models[tied], tp2, pp2, tmp_path / tied)
        (tmp_path / tied).mkdir()
        policy = ranks.run(2, rank_jobs_critic.policy_then_critic, *arguments, False)
        critic = ranks.run(2, rank_jobs_critic.policy_then_critic, *arguments, True)

        def sums(results):
            by_name: dict[str, dict] = {}
            for of_rank in results:
                for (name, box), total in of_rank.items():
                    by_name.setdefault(name, {})[box] = total
            return {name: sum(boxes.values()) for name, boxes in by_name.items()}

        found, expected = sums(critic), sums(policy)
        assert found.pop("value_head.weight") == 0
        assert set(expected) - set(found) == ({"lm_head.weight"} if tied == "untied" else set())
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-9)


def test_value_loss_of_one_micro_batch():
    """Drawn by hand: the second estimate moved too far from the old one, the third is past its return."""
    from types import SimpleNamespace

    from megatron_agent.training.loss import LossStats

    batch = SimpleNamespace(returns_R=torch.tensor([1.0, 2.0, 0.0]), old_values_R=torch.tensor([0.5, 0.5, 0.5]))
    values = torch.tensor([0.6, 1.5, 0.1], requires_grad=True)
    stats = LossStats()
    loss = ValueObjective(clip=0.2).loss(values, batch, BatchSize(6, 1), stats)
    # squares: 0.4^2; clipped 0.7 - 2 = 1.3^2 beats 0.5^2; clipped 0.3^2 beats 0.1^2
    assert float(loss) == pytest.approx((0.16 + 1.69 + 0.09) / 12)
    loss.backward()
    assert values.grad.tolist() == pytest.approx([2 * -0.4 / 12, 0, 0])
    assert stats.means()["value_clip_fraction"] == pytest.approx(2 / 3)
    residual = torch.tensor([0.4, 0.5, -0.1])
    expected = 1 - float(residual.var(correction=0) / batch.returns_R.var(correction=0))
    assert explained_variance(stats.means()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="fill returns_T"):
        ValueObjective().loss(values, SimpleNamespace(returns_R=None), BatchSize(6, 1), stats)
