"""What the ranks of test_text_family.py run: a Qwen2 text model on rows of text."""

import numpy as np
import rank_jobs
from rank_jobs_gradients import complete_gradients

from megatron_agent.models.mapping import as_index
from megatron_agent.models.qwen2 import Qwen2
from megatron_agent.training.loss import Supervised
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.types import BatchSize, TrainSample


def make_samples():
    """Six rows of one to three turns."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(6):
        turns = [(int(rng.integers(1, 9)), int(rng.integers(1, 12))) for _ in range(i % 3 + 1)]
        own = [is_own for prompt, response in turns for is_own in [False] * prompt + [True] * response]
        ids, zeros = [int(t) for t in rng.integers(0, 250, len(own))], [0.0] * len(own)
        samples.append(TrainSample(ids, own, zeros, [float(o) for o in own], [], str(i), 0.0, [False] * len(ids)))
    return samples


def compare(path, layout, gradient_file):
    """-> log-probs by row, {box of an HF tensor: max |gradient - transformers'|}."""
    from safetensors import safe_open

    from megatron_agent.training.megatron import MegatronModel

    family = Qwen2(path)
    model = MegatronModel(family, family.balanced(layout), ModelOptions("float32"))
    samples = make_samples()
    plan = rank_jobs.plan_for(samples, layout, rank_jobs.BUDGET_TOKENS)[model.at.data]
    logprobs, _ = model.logprobs(samples, plan, rank_jobs.pixels, 1.0)
    model.reset_optimizer(OptimizerOptions(0.0, 0.0, rank_jobs.BETAS, 0.0))
    model.update(samples, plan, rank_jobs.pixels, Supervised(), BatchSize.of(samples), 0.0, 1.0)
    gradients, errors = complete_gradients(model), {}
    with safe_open(gradient_file, framework="pt") as reader:
        for piece in model.pieces:
            theirs = reader.get_slice(piece.hf_name)[as_index(piece.hf_slice)]
            errors[piece.hf_name, piece.hf_slice] = float(
                (gradients[piece.param][as_index(piece.param_slice)] - theirs).abs().max()
            )
    return logprobs, errors
