"""What runs in the processes of tools/parity.py: transformers in one, Megatron ranks over gloo in others; and their rows.

The parent imports neither transformers nor Megatron, and the two never share a process: the stand-ins for CUDA spoil
what transformers loads after them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_agent.balance import split_balanced
from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.models.mapping import as_index
from megatron_agent.models.qwen2 import Qwen2
from megatron_agent.training.actor import interleavable
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.training.packing import padded_length, plan_microbatches
from megatron_agent.types import BatchSize, ImageRef, TrainSample

LR, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.01, 1.0
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # real models take minutes a step on CPU; a rank that dies is seen at once

Picture = tuple[int, int]  # (columns, rows) in merged tokens
SMALLEST: Picture = (1, 1)
WIDE: Picture = (21, 1)  # wider than 1:20
SEVERAL_WINDOWS: Picture = (6, 9)  # windows are four tokens wide and high: two whole ones and parts


def family_of(path: Path) -> Qwen2:
    """The family that the folder's config.json names, read from it. Raises CheckpointError."""
    return type(read_family(path))(path)  # type: ignore[return-value]  # every family so far is one


def pixels(ref: ImageRef) -> np.ndarray:
    """Noise that depends on the picture's name alone."""
    rng = np.random.default_rng(zlib.crc32(ref.source.encode()))
    return rng.integers(0, 256, (ref.height_px, ref.width_px, 3), dtype=np.uint8)


def pictures_of_row(row: int, rng: np.random.Generator) -> list[Picture]:
    """No, one and many by turns; the first rows hold the smallest, the wide and the windowed one."""
    fixed: list[Picture] = {1: [SMALLEST], 2: [WIDE, SEVERAL_WINDOWS]}.get(row, [])
    count = (0, 1, int(rng.integers(3, 6)))[row % 3]
    return [*fixed, *((int(c), int(r)) for c, r in rng.integers(1, 8, (count - len(fixed), 2)))]


def make_rows(family: Qwen2, ordinary: Sequence[int], around: tuple, count: int, seed: int) -> list[TrainSample]:
    """`ordinary`: token ids that text is drawn from; `around`: those before and after a picture's. A text family's rows have
    the text of several turns and no pictures."""
    rng = np.random.default_rng(seed)
    has_pictures = family.image_token_id is not None
    side = family.vision.patch_size * family.vision.spatial_merge_size if has_pictures else 0

    def text(least: int, most: int) -> list[int]:
        return [ordinary[i] for i in rng.integers(0, len(ordinary), int(rng.integers(least, most + 1)))]

    samples = []
    for row in range(count):
        parts: list[tuple[list[int], bool]] = [(text(0, 5), False)]  # some rows begin with their picture
        refs = []
        for index, (columns, rows) in enumerate(pictures_of_row(row, rng)):
            if has_pictures:
                refs.append(ImageRef(f"{seed}/{row}/{index}", side * columns, side * rows))
                parts.append(([around[0], *[family.image_token_id] * (columns * rows), around[1]], False))
            parts.append((text(1, 9), index % 2 == 1))  # every other picture is followed by a turn of the model's
        parts += [(text(2, 6), False), (text(6, 24), True)]
        ids = [token for tokens, _ in parts for token in tokens]
        own = [is_own for tokens, is_own in parts for _ in tokens]
        zeros = [0.0] * len(ids)
        samples.append(TrainSample(ids, own, zeros, [float(o) for o in own], refs, str(row), 0.0, [False] * len(ids)))
    return samples


# transformers


@dataclass(frozen=True)
class Reference:
    """`logprobs`: per row, of its action tokens. `losses`: before every step and after the last."""

    logprobs: list[list[float]]
    losses: list[float]
    gradient_file: Path
    gradient_peaks: dict[str, float]  # of every HF tensor: its largest |gradient|


def hf_name(name: str) -> str:
    """Name in memory -> name in the file."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def run_transformers(path: Path, samples: list[TrainSample], adam_steps: int, gradient_file: Path) -> Reference:
    """Log-probs, gradients of the token-mean cross-entropy (written to `gradient_file`), and torch's AdamW."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    family = family_of(path)
    model_class = AutoModelForCausalLM if family.image_token_id is None else AutoModelForImageTextToText
    model = model_class.from_pretrained(path, dtype=torch.float32).eval()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]  # Megatron decays no norms and no biases
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPSILON, foreach=False)
    logprobs, loss = _forward_backward(model, family, samples)
    gradients = {
        hf_name(name): torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for name, p in model.named_parameters()
    }
    save_file(gradients, gradient_file)
    peaks = {name: float(g.abs().max()) for name, g in gradients.items()}
    del gradients
    losses = [loss]
    for step in range(adam_steps):
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(_forward_backward(model, family, samples, backward=step + 1 < adam_steps)[1])
    return Reference(logprobs, losses, gradient_file, peaks)


def _forward_backward(model, family: Qwen2, samples: list[TrainSample], backward: bool = True):
    """Row by row -> log-probs of the action tokens, token-mean cross-entropy; gradients accumulate."""
    num_tokens = sum(sample.num_action_tokens for sample in samples)
    found, total = [], 0.0
    for sample in samples:
        row = torch.tensor([sample.token_ids_T])
        options = {}
        if family.image_token_id is not None:
            options["mm_token_type_ids"] = (row == family.image_token_id).int()
        if sample.images:
            options["pixel_values"] = torch.cat([torch.from_numpy(family.patches(pixels(ref))) for ref in sample.images])
            options["image_grid_thw"] = torch.tensor([family.grid(ref) for ref in sample.images])
        own = torch.tensor(sample.action_mask_T).nonzero()[:, 0]
        with torch.set_grad_enabled(backward):
            logits = model(input_ids=row, use_cache=False, **options).logits[0]
            logprobs = logits[own - 1].log_softmax(-1).gather(1, row[0, own, None])[:, 0]
            if backward:
                (-logprobs.sum() / num_tokens).backward()
        found.append(logprobs.tolist())
        total -= sum(found[-1])
    return found, total / num_tokens


# Megatron


@dataclass(frozen=True)
class RankResult:
    """`logprobs` and `losses` (sums over tokens, of every step) add up over ranks; `errors`: HF tensor -> max |g - g_ref|
    over what this rank holds of it."""

    logprobs: dict[int, list[float]]
    last_logprobs: dict[int, list[float]]
    loss_sums: list[float]
    errors: dict[str, float]
    num_microbatches: int


def make_plan(samples: Sequence[TrainSample], layout: Layout, packed: bool) -> list[list[list[int]]]:
    """plan[data-parallel rank][micro-batch] = rows: about two micro-batches a rank (no fewer than stages), or one a row."""
    lengths = [padded_length(sample.num_tokens, layout.segment_multiple) for sample in samples]
    if packed:
        budget = max(lengths) + sum(lengths) // (2 * layout.data_parallel)
        plan = plan_microbatches(lengths, budget, layout.data_parallel, max(2, layout.pipeline_parallel))
        return interleavable(plan, layout)
    ranks = split_balanced(lengths, layout.data_parallel)
    most = max(len(rank) for rank in ranks)
    return interleavable([[*([row] for row in rank), *([] for _ in range(most - len(rank)))] for rank in ranks], layout)


def run_megatron(
    path: Path, layout: Layout, packed: bool, samples: list[TrainSample], adam_steps: int, gradient_file: Path
) -> RankResult:
    """On every rank of the layout's world; collective."""
    from megatron_agent.training.loss import Supervised
    from megatron_agent.training.megatron import MegatronModel

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // layout.world_size))
    model = MegatronModel(family_of(path), layout, ModelOptions("float32"))
    plan = make_plan(samples, layout, packed)[model.at.data]

    def update(lr: float) -> float:
        stats, _ = model.update(samples, plan, pixels, Supervised(), BatchSize.of(samples), lr, 1.0)
        return stats.sums.get("loss", 0.0) if model.is_reporter else 0.0

    logprobs, _ = model.logprobs(samples, plan, pixels, 1.0)
    # A step of length 0, unclipped: the gradients stay as they were summed.
    model.reset_optimizer(OptimizerOptions(0.0, 0.0, BETAS, 0.0))
    update(0.0)
    for chunk in model.ddp:
        gather_gradients(chunk)
    errors = gradient_errors(model, gradient_file) if model.at.data == model.at.context == 0 else {}
    model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))
    loss_sums = [update(LR) for _ in range(adam_steps)]
    last, _ = model.logprobs(samples, plan, pixels, 1.0) if adam_steps else (logprobs, None)
    return RankResult(logprobs, last, loss_sums, errors, len(plan))


def gather_gradients(ddp) -> None:
    """Complete every rank's `main_grad`.

    With the distributed optimizer the data x context ranks reduce-scatter: each holds the sums of its own shard of every
    bucket, and unsummed values in the others.
    """
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for bucket_group in ddp.bucket_groups:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            shards = shard_buffer(bucket.grad_data, group.size())
            dist.all_gather(list(shards), shards[group.rank()].clone(), group=group)


def gradient_errors(model, gradient_file: Path) -> dict[str, float]:
    """HF tensor -> max |difference| over the boxes of it that this rank's parameters hold."""
    from safetensors import safe_open

    parameters = dict(model.module.named_parameters())
    errors: dict[str, float] = {}
    with safe_open(gradient_file, framework="pt") as reader:
        for piece in model.pieces:
            mine = parameters[piece.param].main_grad[as_index(piece.param_slice)]
            theirs = reader.get_slice(piece.hf_name)[as_index(piece.hf_slice)]
            errors[piece.hf_name] = max_of(errors.get(piece.hf_name, 0.0), float((mine - theirs).abs().max()))
    return errors


def max_of(*values: float) -> float:
    """Like max, but NaN when one is NaN (max would drop it or not, by order)."""
    return float(np.max(values))


# Processes


class RankError(Exception):
    """A process raised or died; the text is its own traceback."""


def serve(rank: int, inbox: Connection) -> None:
    """Body of one process: one function after another, each with process groups of its own. Ends with None or the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its ranks
    import torch.distributed as dist

    from megatron_agent.training import cpu

    cpu.guard_collectives()  # first: Megatron keeps references to some collectives from its import on
    cpu.install()
    from megatron.core import parallel_state

    while (job := _receive(inbox)) is not None:
        function, world_size, store, arguments = job
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
            )
            inbox.send(("result", function(*arguments)))
        except (CheckpointError, ConfigError) as error:
            inbox.send(("input", str(error)))
        except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
            inbox.send(("error", traceback.format_exc()))
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()


def _receive(inbox: Connection) -> tuple | None:
    try:
        return inbox.recv()
    except EOFError:
        return None


class Ranks:
    """Processes started once. A failed job ends them all (its peers may hang in a collective); the next starts new ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, world_size: int, function: Callable, *arguments: object) -> list:
        """`function(*arguments)` on ranks 0 .. world_size - 1 -> results in rank order. Raises RankError, CheckpointError."""
        if not self.processes:
            self.start()
        with tempfile.TemporaryDirectory() as folder:
            try:
                for pipe in self.pipes[:world_size]:
                    pipe.send((function, world_size, str(Path(folder) / "store"), arguments))
                return self._collect(world_size)
            except (RankError, CheckpointError):
                self.stop()
                raise

    def _collect(self, world_size: int) -> list:
        results: dict[int, Any] = {}
        while len(results) < world_size:
            for pipe in wait([self.pipes[rank] for rank in range(world_size) if rank not in results]):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    kind, content = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    raise RankError(f"rank {rank} died") from None
                if kind == "input":
                    raise CheckpointError(content)
                if kind == "error":
                    raise RankError(f"rank {rank}: {content}")
                results[rank] = content
        return [results[rank] for rank in range(world_size)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()  # they hold nothing
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


def in_process(function: Callable, *arguments: object):
    """`function(*arguments)` in a new process. Raises RankError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        kind, content = ours.recv()
    except EOFError:
        raise RankError("its process died") from None
    finally:
        process.kill()
        process.join()
    if kind == "error":
        raise RankError(content)
    return content


def _report(outbox: Connection, function: Callable, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outbox.send(("result", function(*arguments)))
    except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
        outbox.send(("error", traceback.format_exc()))
