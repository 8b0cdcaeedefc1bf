"""What the ranks of test_critic.py run."""

from pathlib import Path

import rank_jobs
import torch

from megatron_agent.training.options import OptimizerOptions
from megatron_agent.types import BatchSize

CRITIC_LR = 1e-4


def value_weight(hidden_size):
    return 0.1 * torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(5))


def make_critic(path, layout):
    critic = rank_jobs.make_model(path, layout, head="value")
    critic.reset_optimizer(OptimizerOptions(rank_jobs.LR, rank_jobs.WEIGHT_DECAY, rank_jobs.BETAS, rank_jobs.CLIP))
    return critic


def values_and_steps(path, layout, count):
    """-> values at the start (all 0), values under a random head, value losses and gradient norms of `count` steps."""
    from megatron_agent.training.critic import ValueObjective

    critic = make_critic(path, layout)
    samples = rank_jobs.make_samples(critic.family)
    plan = rank_jobs.plan_for(samples, layout, rank_jobs.BUDGET_TOKENS)[critic.at.data]
    at_start, _ = critic.logprobs(samples, plan, rank_jobs.pixels, 1.0)
    for chunk in critic.chunks:
        if hasattr(chunk, "value_head"):
            chunk.value_head.weight.data.copy_(value_weight(critic.config.hidden_size))
    critic.optimizer.reload_model_params()
    values, _ = critic.logprobs(samples, plan, rank_jobs.pixels, 1.0)
    for index, sample in enumerate(samples):
        sample.returns_T = [float(index % 3) if own else 0.0 for own in sample.action_mask_T]
        sample.values_T = [0.25 if own else 0.0 for own in sample.action_mask_T]
    size, steps = BatchSize.of(samples), []
    for _ in range(count):
        stats, norms = critic.update(samples, plan, rank_jobs.pixels, ValueObjective(clip=5.0), size, CRITIC_LR, 1.0)
        reports = critic.is_reporter
        steps.append((dict(stats.sums) if reports else {}, stats.num_tokens if reports else 0, norms["grad_norm"]))
    return at_start, values, steps


def policy_then_critic(path, policy_layout, critic_layout, folder, is_critic):
    """First a policy takes steps and saves (`is_critic` False), then a critic in another layout loads its weights ->
    {HF name of whole tensors: sum} of what this rank holds."""
    from megatron_agent.training.checkpoint import load_weights, save_megatron

    if not is_critic:
        steps = rank_jobs.Steps(path, policy_layout)
        steps.take(2)
        save_megatron(steps.model, Path(folder))
        model = steps.model
    else:
        model = make_critic(path, critic_layout)
        before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        load_weights(model, Path(folder))
        same = [name for name, p in model.module.named_parameters() if torch.equal(p, before[name])]
        assert same in ([], ["value_head.weight"]), same
    parameters = dict(model.module.named_parameters())
    return {
        (piece.hf_name, piece.hf_slice): float(parameters[piece.param][rank_jobs_index(piece)].double().sum())
        for piece in model.pieces
    }


def rank_jobs_index(piece):
    from megatron_agent.models.mapping import as_index

    return as_index(piece.param_slice)
