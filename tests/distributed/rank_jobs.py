"""What the ranks of tests/distributed run. Functions are sent by name, results as plain numbers."""

from pathlib import Path

import numpy as np

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.actor import interleavable
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.training.packing import padded_length, plan_microbatches
from megatron_agent.types import BatchSize, ImageRef, TrainSample

LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.01, 1.0
BUDGET_TOKENS = 90


def pixels(ref):
    rng = np.random.default_rng(sum(map(ord, ref.source)))
    return rng.integers(0, 256, (ref.height_px, ref.width_px, 3), dtype=np.uint8)


def make_samples(family):
    """Eight rows: pictures in the prompt and between two turns, at the start, two in a row of text, and none at all."""
    rng = np.random.default_rng(0)

    def text(n):
        return [int(t) for t in rng.integers(0, 250, n)]

    def picture(name, columns, rows):
        return ImageRef(name, 28 * columns, 28 * rows), [family.image_token_id] * (columns * rows)

    samples = []
    for i in range(8):
        parts: list[tuple[list[int], bool]] = []
        refs = []
        if i != 3:
            ref, tokens = picture(f"prompt {i}", 3, 2 + i % 2)
            refs.append(ref)
            parts += [(text(i % 4), False), (tokens, False)]
        parts += [(text(6), False), (text(7 + i), True)]
        if i not in (3, 5):
            ref, tokens = picture(f"crop {i}", 2, 2 + i % 3)
            refs.append(ref)
            parts += [(text(1), False), (tokens, False), (text(2), False), (text(5), True)]
        ids = [t for tokens, _ in parts for t in tokens]
        mask = [own for tokens, own in parts for _ in tokens]
        zeros = [0.0] * len(ids)
        samples.append(TrainSample(ids, mask, zeros, [float(own) for own in mask], refs, str(i), 0.0, [False] * len(ids)))
    return samples


def make_model(path, layout, recompute="none", dtype="float32", **options):
    from megatron_agent.training.megatron import MegatronModel

    return MegatronModel(Qwen2_5_VL(path), layout, ModelOptions(dtype, recompute=recompute, **options))


def plan_for(samples, layout, budget):
    fewest = 1 if layout.pipeline_parallel == 1 else 2 * layout.pipeline_parallel
    lengths = [padded_length(s.num_tokens, layout.segment_multiple) for s in samples]
    return interleavable(plan_microbatches(lengths, budget, layout.data_parallel, fewest), layout)


class Steps:
    """Adam steps of cross-entropy on the same rows."""

    def __init__(self, path: Path, layout: Layout, budget: int = BUDGET_TOKENS, recompute: str = "none") -> None:
        self.model = make_model(path, layout, recompute)
        self.samples = make_samples(self.model.family)
        self.plan = plan_for(self.samples, layout, budget)[self.model.at.data]
        self.size = BatchSize.of(self.samples)
        self.model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))

    def take(self, count, algorithm=None):
        """-> per step (sum of the losses of this rank's tokens, their number, gradient norm); reporters only count."""
        from megatron_agent.training.loss import Supervised

        taken, self.of_blocks = [], []
        for _ in range(count):
            algorithm = algorithm or Supervised()
            stats, norms = self.model.update(self.samples, self.plan, pixels, algorithm, self.size, LR, 1.0)
            norm = norms.pop("grad_norm")
            self.of_blocks.append(norms)
            reports = self.model.is_reporter
            taken.append((stats.sums["loss"] if reports else 0.0, stats.num_tokens if reports else 0, norm))
        return taken


def train(path, layout, budget=BUDGET_TOKENS, temperature=1.0, count=5, recompute="none"):
    """-> log-probs before the first step, the steps, and where Megatron says that this rank sits."""
    from megatron.core import parallel_state

    steps = Steps(path, layout, budget, recompute)
    logprobs, _ = steps.model.logprobs(steps.samples, steps.plan, pixels, temperature)
    at = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    ours = (steps.model.at.tensor, steps.model.at.data, steps.model.at.pipeline, steps.model.at.context)
    return {
        "logprobs": logprobs, "steps": steps.take(count), "of_blocks": steps.of_blocks, "at": at, "ours": ours,
        "num_microbatches": len(steps.plan),
    }  # fmt: skip


def train_on_few_rows(path, layout, num_rows):
    """-> log-probs of the first rows, and three steps on them: two of cross-entropy, one of GRPO."""
    from megatron_agent.algorithms.grpo import GRPO

    steps = Steps(path, layout)
    steps.samples = steps.samples[:num_rows]
    longest = max(padded_length(s.num_tokens, layout.segment_multiple) for s in steps.samples)
    steps.plan = plan_for(steps.samples, layout, longest)[steps.model.at.data]  # a micro-batch per row
    steps.size = BatchSize.of(steps.samples)
    logprobs, _ = steps.model.logprobs(steps.samples, steps.plan, pixels, 1.0)
    num_empty = sum(not batch for batch in steps.plan)
    return {"logprobs": logprobs, "steps": steps.take(2) + steps.take(1, GRPO()), "num_empty": num_empty}


def gradient_errors(path, layout, reference, budget=BUDGET_TOKENS):
    """Gradients of every parameter of this rank against those of transformers (a safetensors file) -> {name: max |diff|}."""
    from safetensors import safe_open

    from megatron_agent.models.mapping import as_index
    from megatron_agent.training.loss import Supervised

    steps = Steps(path, layout, budget)
    model = steps.model
    model.reset_optimizer(OptimizerOptions(0.0, 0.0, BETAS, 0.0))  # no clipping, no step: the gradients stay as they are summed
    model.update(steps.samples, steps.plan, pixels, Supervised(), steps.size, 0.0, 1.0)
    parameters = dict(model.module.named_parameters())
    errors = {}
    with safe_open(reference, framework="pt") as reader:
        for piece in model.pieces:
            mine = parameters[piece.param].main_grad[as_index(piece.param_slice)]
            theirs = reader.get_slice(piece.hf_name)[as_index(piece.hf_slice)]
            errors[f"{piece.param} {piece.param_slice}"] = float((mine - theirs).abs().max())
    padding = [
        float(p.main_grad[int(max((q.param_slice[0][1] for q in model.pieces if q.param == name), default=0)) :].abs().sum())
        for name, p in parameters.items()
        if "word_embeddings" in name or "output_layer" in name
    ]
    return errors, padding


def save_and_go_on(path, layout, folder):
    """Two steps, a checkpoint, two more; then the checkpoint is loaded back and the two are taken again."""
    from megatron_agent.training.checkpoint import load_megatron, save_megatron

    steps = Steps(path, layout)
    before = steps.take(2)
    save_megatron(steps.model, Path(folder))
    went_on = steps.take(2)
    load_megatron(steps.model, Path(folder))
    return {"before": before, "went_on": went_on, "again": steps.take(2)}


def resume(path, layout, folder):
    """A new model of any layout from the checkpoint, and two steps."""
    from megatron_agent.training.checkpoint import load_megatron

    steps = Steps(path, layout)
    load_megatron(steps.model, Path(folder))
    return steps.take(2)


def send_weights(path, layout, plan, sync_round):
    from megatron_agent.weights.sender import send

    model = make_model(path, layout)
    return send(model.module, [copy for copy in plan if copy.src_rank == model.rank], sync_round)


def loss_is_nan(path, layout):
    """-> (the error's text, whether a parameter changed)."""
    import torch

    from megatron_agent.algorithms.base import Algorithm
    from megatron_agent.errors import TrainingError
    from megatron_agent.types import LossOutputs

    class Broken(Algorithm):
        def advantages(self, samples):
            raise NotImplementedError

        def loss(self, inputs):
            return LossOutputs(inputs.logprobs_R * float("nan"))

    steps = Steps(path, layout)
    before = [p.detach().clone() for p in steps.model.module.parameters()]
    try:
        steps.take(1, Broken())
    except TrainingError as error:
        return str(error), any(not torch.equal(a, b) for a, b in zip(before, steps.model.module.parameters()))
    return "", True


def non_contiguous_broadcast():
    import torch
    import torch.distributed as dist

    try:
        dist.broadcast(torch.zeros(4, 4).t()[1:], src=0)
    except ValueError as error:
        return str(error)
    return ""
