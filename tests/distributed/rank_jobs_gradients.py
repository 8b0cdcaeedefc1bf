"""Whole gradients of ranks that hold parts of the sum, and what the ranks of test_gradient_splits.py run."""

import rank_jobs
import torch

from megatron_agent.algorithms.base import Algorithm
from megatron_agent.training.layout import Layout
from megatron_agent.training.loss import Supervised
from megatron_agent.training.options import OptimizerOptions
from megatron_agent.types import LossInputs, LossOutputs

NUM_ROWS = 7  # no multiple of the data-parallel ranks


def complete_gradients(model):
    """Every rank's `main_grad` as summed over all data and context ranks.

    They reduce-scatter: each holds the sums of its own shard of every bucket, and unsummed values in the others.
    """
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for chunk in model.ddp:
        for bucket_group in chunk.bucket_groups:
            group = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                shards = shard_buffer(bucket.grad_data, group.size())
                dist.all_gather(list(shards), shards[group.rank()].clone(), group=group)
    return {name: parameter.main_grad for name, parameter in model.module.named_parameters()}


class OverSequences(Algorithm):
    """The mean over sequences: of their token-mean cross-entropy, or of their likelihood ratios (arXiv 2507.18071,
    equation 5, advantage 1), whose gradient goes through the sum over context ranks; at ratio 1 the two gradients are equal.
    """

    def __init__(self, samples, of_ratios):
        super().__init__()
        self.num_tokens, self.num_sequences = sum(s.num_action_tokens for s in samples), len(samples)
        self.of_ratios = of_ratios

    def advantages(self, samples):
        raise NotImplementedError

    def loss(self, inputs: LossInputs) -> LossOutputs:
        lengths = inputs.sum_over_sequence(torch.ones_like(inputs.logprobs_R))
        loss = -inputs.logprobs_R
        if self.of_ratios:
            ratio = (inputs.sum_over_sequence(inputs.logprobs_R - inputs.old_logprobs_R) / lengths).exp()
            loss = -ratio[inputs.sample_index_R]
        return LossOutputs(loss * self.num_tokens / (self.num_sequences * lengths[inputs.sample_index_R]))


def algorithms(samples):
    return {
        "token mean": Supervised(),
        "sequence mean": OverSequences(samples, of_ratios=False),
        "sequence ratio": OverSequences(samples, of_ratios=True),
    }


class Gradients:
    """Of one layout, with steps of length 0: the model stays as it is."""

    def __init__(self, path, layout):
        self.layout, self.model = layout, rank_jobs.make_model(path, layout)
        self.samples = rank_jobs.make_samples(self.model.family)[:NUM_ROWS]
        self.model.reset_optimizer(OptimizerOptions(0.0, 0.0, rank_jobs.BETAS, 0.0))

    def of(self, samples, plan, algorithm, denominator):
        self.model.update(samples, plan, rank_jobs.pixels, algorithm, denominator, 0.0, 1.0)
        return complete_gradients(self.model)


def write_expected(path, file):
    """One row at a time on one rank: row by row divided by the tokens of all rows, or by its own tokens and the rows."""
    from safetensors.torch import save_file

    gradients = Gradients(path, Layout())
    num_tokens, expected = sum(s.num_action_tokens for s in gradients.samples), {}
    for sample in gradients.samples:
        denominators = {"token mean": num_tokens, "sequence mean": NUM_ROWS * sample.num_action_tokens}
        for mean, denominator in denominators.items():
            for name, gradient in gradients.of([sample], [[0]], Supervised(), denominator).items():
                key = f"{mean} {name}"
                expected[key] = expected[key] + gradient if key in expected else gradient.clone()
    save_file(expected, file)


def compare(path, layout, budgets, file):
    """-> {(tokens of a micro-batch, algorithm): (number of micro-batches, max relative error, of which parameter)}."""
    from safetensors.torch import load_file

    gradients, expected = Gradients(path, layout), load_file(file)
    num_tokens, found = sum(s.num_action_tokens for s in gradients.samples), {}
    for budget in budgets:
        plan = rank_jobs.plan_for(gradients.samples, layout, budget)[gradients.model.at.data]
        for algorithm, instance in algorithms(gradients.samples).items():
            mean = "token mean" if algorithm == "token mean" else "sequence mean"
            errors = {}
            for name, gradient in gradients.of(gradients.samples, plan, instance, num_tokens).items():
                theirs = expected[f"{mean} {name}"]
                errors[name] = float((gradient - theirs).abs().max() / theirs.abs().max())
            worst = max(errors, key=errors.__getitem__)
            found[budget, algorithm] = (len(plan), errors[worst], worst)
    return found
