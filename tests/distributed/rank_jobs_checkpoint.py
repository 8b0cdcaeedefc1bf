"""What the ranks of the checkpoint tests run."""

from pathlib import Path

from rank_jobs import BETAS, BUDGET_TOKENS, CLIP, LR, WEIGHT_DECAY, make_samples, pixels, plan_for

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.types import BatchSize


class Run:
    """Updates on rows that come in an order of their own, at a rate that changes with the step."""

    def __init__(self, path, layout, dtype="float32"):
        from megatron_agent.training.actor import TrainingConfig
        from megatron_agent.training.megatron import MegatronModel

        self.model = MegatronModel(Qwen2_5_VL(path), layout, ModelOptions(dtype))
        self.model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))
        self.samples = make_samples(self.model.family)
        self.schedule = TrainingConfig(lr=LR, warmup_steps=2, num_steps=4, lr_schedule="cosine")
        self.step, self.order = 0, list(range(len(self.samples)))

    def take(self, count):
        """-> per step (sum of the losses of this rank's tokens, their number, gradient norm)."""
        from megatron_agent.training.loss import Supervised

        taken = []
        for _ in range(count):
            self.step += 1
            self.order = self.order[3:] + self.order[:3]
            rows = [self.samples[i] for i in self.order[:6]]
            plan = plan_for(rows, self.model.layout, BUDGET_TOKENS)[self.model.at.data]
            lr = self.schedule.lr_at(self.step)
            stats, norms = self.model.update(rows, plan, pixels, Supervised(), BatchSize.of(rows), lr, 1.0)
            reports = self.model.is_reporter
            taken.append((stats.sums["loss"] if reports else 0.0, stats.num_tokens if reports else 0, norms["grad_norm"]))
        return taken

    def state(self):
        return {"step": self.step, "order": self.order}

    def set_state(self, state):
        self.step, self.order = state["step"], state["order"]


def draw():
    """Numbers of every generator, as a step would draw them."""
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(2).tolist()
    return [random.random(), np.random.rand(), *torch.rand(2).tolist(), *tracked]


def digest(model):
    """Of all weights and the optimizer's tensors of this rank."""
    import zlib

    import torch

    from megatron_agent.training.optimizer_state import distributed_optimizers

    tensors = list(model.module.parameters())
    for optimizer in distributed_optimizers(model):
        adam = optimizer.optimizer
        tensors += [p for group in adam.param_groups for p in group["params"]]
        tensors += [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    crc32 = 0
    for tensor in tensors:
        crc32 = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(), crc32)
    return crc32


def whole_run(path, layout, root, dtype="float32"):
    """Four steps without a stop, with a checkpoint after the second whose files are written after the fourth."""
    import threading

    import torch.distributed as dist

    from megatron_agent.training.checkpoint import begin_checkpoint, finish_checkpoint
    from megatron_agent.training.snapshot import Saver, assemble

    run, root = Run(path, layout, dtype), Path(root)
    saver = Saver(run.model)
    before = run.take(2)
    draw()
    if run.model.rank == 0:
        begin_checkpoint(root, 2)
    dist.barrier()
    aside = root / ".step_00000002.partial"
    slow_disk = threading.Event()
    saver._threads.submit(slow_disk.wait)
    saver.start(aside)
    saved, state, numbers = digest(run.model), run.state(), draw()
    after = run.take(2)
    slow_disk.set()
    saver.wait()
    dist.barrier()
    if run.model.rank == 0:
        finish_checkpoint(root, 2, state, assemble(aside, dist.get_world_size()))
    return {"before": before, "after": after, "digest": saved, "numbers": numbers, "went_on": digest(run.model)}


def second_half(path, layout, root, dtype="float32", count=2):
    """Steps 3 and 4 in a new process, from the newest checkpoint."""
    from megatron_agent.training.checkpoint import complete_checkpoints, load_megatron, read_state

    run, folder = Run(path, layout, dtype), complete_checkpoints(Path(root))[-1]
    run.set_state(read_state(folder))
    load_megatron(run.model, folder)
    loaded, numbers = digest(run.model), draw()
    return {"after": run.take(count), "digest": loaded, "numbers": numbers, "went_on": digest(run.model)}


def load_errors(path, layout, folders):
    """The error of loading each folder ("" for none), and whether anything of the model changed."""
    from megatron_agent.errors import CheckpointError
    from megatron_agent.training.checkpoint import load_megatron

    run, texts = Run(path, layout), []
    run.take(1)
    before = digest(run.model)
    for folder in folders:
        try:
            load_megatron(run.model, Path(folder))
            texts.append("")
        except CheckpointError as error:
            texts.append(str(error))
            assert digest(run.model) == before, f"{folder}: the model changed"
    return texts


def save_beyond_the_disk(path, layout, folder, limit_bytes):
    """-> (the error of a write that finds no room, in `is_writing` and in the next start; then a save that fits)."""
    import resource

    from megatron_agent.errors import CheckpointError
    from megatron_agent.training.snapshot import Saver

    run, texts = Run(path, layout), []
    saver = Saver(run.model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for ask in (saver.is_writing, lambda: saver.start(Path(folder)), saver.wait):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
        try:
            saver.start(Path(folder))
            saver._threads.submit(lambda: None).result()  # it has come to its end
            ask()
            texts.append("")
        except CheckpointError as error:
            texts.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.start(Path(folder))
    saver.wait()
    return texts


def save_part(path, layout, folder):
    """What a worker does when Checkpoints asks for a save."""
    from megatron_agent.training.snapshot import Saver

    run = Run(path, layout)
    run.take(1)
    saver = Saver(run.model)
    saver.start(Path(folder))
    saver.wait()
