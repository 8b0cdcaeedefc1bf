"""Whole gradients of ranks that hold parts of the sum, and what the ranks of test_gradient_splits.py run."""

import random

import rank_jobs

from megatron_agent import registry
from megatron_agent.algorithms.options import AGGREGATIONS
from megatron_agent.options import build
from megatron_agent.training.layout import Layout
from megatron_agent.training.loss import Supervised
from megatron_agent.training.options import OptimizerOptions
from megatron_agent.types import BatchSize

NUM_ROWS = 5  # no multiple of the data-parallel ranks


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


def algorithms():
    """Every file of algorithms/ as it comes; GRPO with every aggregation, and with all that acts within a loss."""
    found = {name: registry.resolve("algorithms", name)() for name in registry.names("algorithms")}
    for kind in AGGREGATIONS:
        found[f"grpo {kind}"] = _grpo({"aggregation": kind, "fixed_length_tokens": 64 * (kind == "fixed-length")})
    for level in ("sequence", "geometric"):
        weights = {"correction": "truncate", "level": level, "high": 1.1, "max_lag": 1}
        kl = {"coefficient": 0.5, "estimator": "k3"}
        found[f"grpo {level}"] = _grpo({"importance": weights, "kl": kl, "entropy_coefficient": 0.3, "dual_clip": 1.5})
    found["gspo clip"] = _of("gspo", {"importance": {"correction": "clip", "stale_only": True}})
    found["grpo full KL"] = _grpo({"kl": {"coefficient": 0.5, "estimator": "full"}})
    return found | {"supervised": Supervised()}


def _grpo(options):
    return _of("grpo", options)


def _of(name, options):
    component = registry.resolve("algorithms", name)
    return component(build(component.Config, options, "algorithm"))


class Gradients:
    """Of one layout, with steps of length 0: the model stays as it is."""

    def __init__(self, path, layout):
        self.layout, self.model = layout, rank_jobs.make_model(path, layout)
        self.samples = rank_jobs.make_samples(self.model.family)[:NUM_ROWS]
        self.model.reset_optimizer(OptimizerOptions(0.0, 0.0, rank_jobs.BETAS, 0.0))
        self.model.reference.keep()
        for weight in self.model.reference.weights:  # another policy, the same in every layout
            weight.mul_(0.9)

    def plan(self, budget):
        return rank_jobs.plan_for(self.samples, self.layout, budget)[self.model.at.data]

    def of(self, samples, plan, algorithm, size):
        """-> gradient of every parameter, this rank's statistics."""
        stats, _ = self.model.update(samples, plan, rank_jobs.pixels, algorithm, size, 0.0, 1.0)
        return complete_gradients(self.model), stats


def credit(samples, logprobs):
    """Advantages, log-probs of the engine, of an older policy and of a reference, and ages: drawn, the same anywhere."""
    rng = random.Random(3)
    for index, sample in enumerate(samples):
        own = iter(logprobs[index])

        def near(spread, known=None, sample=sample):
            values = iter(known) if known else None
            return [(next(values) if values else 0.0) + rng.gauss(0, spread) if own else 0.0 for own in sample.action_mask_T]

        known = list(own)
        sample.advantages_T = near(1.0)
        sample.old_logprobs_T, sample.rollout_logprobs_T = near(0.3, known), near(0.3, known)
        sample.reference_logprobs_T = near(0.5, known)
        sample.lag_T = [rng.randrange(3) for _ in sample.action_mask_T]


def write_expected(path, file):
    """One row at a time on one rank -> (its log-probs, {algorithm: mean loss}); the sums of gradients go to `file`."""
    from safetensors.torch import save_file

    gradients = Gradients(path, Layout())
    samples, size = gradients.samples, BatchSize.of(gradients.samples)
    logprobs, _ = gradients.model.logprobs(samples, [[i] for i in range(len(samples))], rank_jobs.pixels, 1.0)
    credit(samples, logprobs)
    expected, losses = {}, {}
    for name, algorithm in algorithms().items():
        for sample in samples:
            found, stats = gradients.of([sample], [[0]], algorithm, size)
            losses[name] = losses.get(name, 0.0) + stats.sums["loss"] / size.num_tokens
            for parameter, gradient in found.items():
                key = f"{name} {parameter}"
                expected[key] = expected[key] + gradient if key in expected else gradient.clone()
    save_file(expected, file)
    return logprobs, losses


def compare(path, layout, budgets, file, logprobs):
    """All algorithms as one packed step, budgets in turn -> {algorithm: (micro-batches, max relative error, where, loss)}.

    Tensor and pipeline ranks compare the parameters whose name and shape are those of one rank.
    """
    from safetensors.torch import load_file

    gradients, expected, found = Gradients(path, layout), load_file(file), {}
    credit(gradients.samples, logprobs)
    size = BatchSize.of(gradients.samples)
    for index, (name, algorithm) in enumerate(algorithms().items()):
        plan, errors = gradients.plan(budgets[index % len(budgets)]), {}
        found_gradients, stats = gradients.of(gradients.samples, plan, algorithm, size)
        for parameter, gradient in found_gradients.items():
            theirs = expected.get(f"{name} {parameter}")
            if theirs is not None and theirs.shape == gradient.shape and gradients.layout.pipeline_parallel == 1:
                errors[parameter] = float((gradient - theirs).abs().max() / theirs.abs().max())
        worst = max(errors, key=errors.__getitem__, default="")
        loss = stats.sums["loss"] / size.num_tokens if gradients.model.is_reporter else 0.0
        found[name] = (len(plan), errors.get(worst, 0.0), worst, loss)
    return found


def on_policy(path, layout):
    """Log-probs in one packing, the update in another -> max |ratio - 1|, fraction clipped, of every algorithm."""
    gradients, found = Gradients(path, layout), {}
    samples = gradients.samples
    logprobs, _ = gradients.model.logprobs(samples, gradients.plan(10_000), rank_jobs.pixels, 1.0)
    credit(samples, logprobs)
    for index, sample in enumerate(samples):
        of_actions = iter(logprobs[index])
        sample.old_logprobs_T = [next(of_actions) if own else 0.0 for own in sample.action_mask_T]
    for name in registry.names("algorithms"):
        algorithm = registry.resolve("algorithms", name)()
        _, stats = gradients.of(samples, gradients.plan(52), algorithm, BatchSize.of(samples))
        found[name] = (stats.maxima["ratio_deviation_max"], stats.means()["clip_fraction"])
    return found


def reference_and_asked(path, layout):
    """The reference after steps of the policy, and a model that is only asked, against log-probs at the start -> differences,
    and whether the policy's weights came back."""
    import torch

    steps = rank_jobs.Steps(path, layout)
    model, arguments = steps.model, (steps.samples, steps.plan, rank_jobs.pixels, 1.0)
    at_start, _ = model.logprobs(*arguments)
    model.reference.keep()
    steps.take(2)
    trained, _ = model.logprobs(*arguments)
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    with model.reference.in_place():
        reference, _ = model.logprobs(*arguments)
    same = all(torch.equal(a, b) for a, b in zip(before, model.module.parameters()))
    again, _ = model.logprobs(*arguments)
    return at_start == reference, trained != at_start, trained == again and same


def asked(path, layout):
    """-> log-probs of a model without gradients, optimizer or their memory, and of one that has them; number of gradients."""
    found = []
    for frozen in ("all", ""):
        model = rank_jobs.make_model(path, layout, frozen=frozen)
        samples = rank_jobs.make_samples(model.family)
        plan = rank_jobs.plan_for(samples, layout, 90)[model.at.data]
        found.append(model.logprobs(samples, plan, rank_jobs.pixels, 1.0)[0])
        num_gradients = sum(buffer.grad_data.numel() for chunk in model.ddp for buffer in chunk.buffers)
        found.append(num_gradients)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return found
