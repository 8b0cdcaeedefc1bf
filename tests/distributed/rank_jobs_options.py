"""What the ranks of test_model_options.py run."""

import rank_jobs

from megatron_agent.training.loss import Supervised
from megatron_agent.training.options import OptimizerOptions
from megatron_agent.types import BatchSize


def steps_with(path, layout, count=3, vision_lr_scale=1.0, weight_decay=0.0, **options):
    """-> (steps as rank_jobs.Steps.take gives them, {parameter: change of its values}, vision imbalance)."""
    steps = rank_jobs.Steps.__new__(rank_jobs.Steps)
    steps.model = rank_jobs.make_model(path, layout, **options)
    steps.samples = rank_jobs.make_samples(steps.model.family)
    steps.plan = rank_jobs.plan_for(steps.samples, layout, rank_jobs.BUDGET_TOKENS)[steps.model.at.data]
    steps.size = BatchSize.of(steps.samples)
    steps.model.reset_optimizer(OptimizerOptions(rank_jobs.LR, weight_decay, rank_jobs.BETAS, rank_jobs.CLIP, vision_lr_scale))
    before = {name: p.detach().clone() for name, p in steps.model.module.named_parameters()}
    taken = steps.take(count)
    stats, _ = steps.model.update(steps.samples, steps.plan, rank_jobs.pixels, Supervised(), steps.size, 0.0, 1.0)
    changes = {name: float((p.detach() - before[name]).abs().sum()) for name, p in steps.model.module.named_parameters()}
    return taken, changes, stats.only("vision_imbalance").maxima


def logprobs_of(path, layout, support):
    """-> log-probs of the rows, log-probs' entropy in a step that changes nothing, of GRPO and of cross-entropy."""
    from megatron_agent.algorithms.grpo import GRPO

    model = rank_jobs.make_model(path, layout, support=support)
    samples = rank_jobs.make_samples(model.family)
    plan = rank_jobs.plan_for(samples, layout, rank_jobs.BUDGET_TOKENS)[model.at.data]
    arguments = (samples, plan, rank_jobs.pixels)
    logprobs, _ = model.logprobs(*arguments, 1.0)
    steps = [model.update(*arguments, a, BatchSize.of(samples), 0.0, 1.0)[0] for a in (GRPO(), Supervised())]
    return logprobs, [stats.sums.get("entropy", 0.0) for stats in steps]


def dtypes(path, layout):
    """-> dtypes of parameters, gradients, master weights and moments of a bfloat16 model after a step."""
    import torch

    model = rank_jobs.make_model(path, layout, dtype="bfloat16")
    samples = rank_jobs.make_samples(model.family)
    plan = rank_jobs.plan_for(samples, layout, rank_jobs.BUDGET_TOKENS)[model.at.data]
    model.reset_optimizer(OptimizerOptions(rank_jobs.LR, 0.0, rank_jobs.BETAS, rank_jobs.CLIP))
    model.update(samples, plan, rank_jobs.pixels, Supervised(), BatchSize(100, 10), rank_jobs.LR, 1.0)
    adams = [optimizer.optimizer for optimizer in model.optimizer.chained_optimizers]
    tensors = {
        "parameters": list(model.module.parameters()),
        "gradients": [parameter.main_grad for parameter in model.module.parameters()],
        "masters": [p for adam in adams for group in adam.param_groups for p in group["params"]],
        "moments": [value for adam in adams for state in adam.state.values() for value in state.values()],
    }
    return {kind: sorted({str(v.dtype) for v in values if isinstance(v, torch.Tensor)}) for kind, values in tensors.items()}
