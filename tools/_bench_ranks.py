"""What runs in the processes of tools/bench_train.py: the model, its rows, transformers in one process, Megatron in others.

The parent imports neither transformers nor Megatron, and the two never share a process: the stand-ins for CUDA spoil
what transformers loads after them.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from _parity_ranks import RankError, family_of, pixels

from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.actor import interleavable
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.training.packing import padded_length, plan_microbatches
from megatron_agent.types import BatchSize, ImageRef, TrainSample

LR, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.01, 1.0
Picture = tuple[int, int]  # (width, height) in px


@dataclass(frozen=True)
class ModelSize:
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int
    vision_hidden: int
    vision_ffn: int
    vision_depth: int


@dataclass(frozen=True)
class RowShape:
    """Text tokens of a row, of which the last `action_tokens` are the model's own, and the pictures before them."""

    text_tokens: int
    action_tokens: int
    pictures: tuple[Picture, ...] = ()


def write_model(folder: Path, size: ModelSize) -> int:
    """Random weights, head dims 64 -> number of parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=size.hidden, intermediate_size=size.ffn, num_hidden_layers=size.layers, vocab_size=size.vocab,
            num_attention_heads=size.heads, num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=32768,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]), tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=1, pad_token_id=0,
        ),
        vision_config=dict(
            depth=size.vision_depth, hidden_size=size.vision_hidden, intermediate_size=size.vision_ffn,
            num_heads=size.vision_hidden // 64, out_hidden_size=size.hidden, fullatt_block_indexes=[size.vision_depth - 1],
        ),
        image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_row(family: Qwen2_5_VL, shape: RowShape, name: str) -> TrainSample:
    rng = np.random.default_rng(len(name) + shape.text_tokens)
    side = family.vision.patch_size * family.vision.spatial_merge_size
    refs = [ImageRef(f"{name}/{i}", width, height) for i, (width, height) in enumerate(shape.pictures)]
    ids = [int(t) for t in rng.integers(6, family.text.vocab_size, shape.text_tokens)]
    for ref in refs:
        placeholders = [family.image_token_id] * (ref.width_px // side * (ref.height_px // side))
        ids[1:1] = [4, *placeholders, 5]
    own = [t >= len(ids) - shape.action_tokens for t in range(len(ids))]
    zeros = [0.0] * len(ids)
    return TrainSample(ids, own, zeros, [float(o) for o in own], refs, name, 0.0, [False] * len(ids))


def make_rows(path: Path, shapes: Sequence[RowShape]) -> list[TrainSample]:
    family = family_of(path)
    assert isinstance(family, Qwen2_5_VL)
    return [make_row(family, shape, f"row {i}") for i, shape in enumerate(shapes)]


# Processes that take one step when asked to, so that two can be timed by turns


class Stepper:
    """A process that runs a generator function, one item at a time."""

    def __init__(self, function: Callable[..., Iterator], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __next__(self):
        """Raises RankError with the process's own traceback."""
        try:
            self.pipe.send("next")
            ok, content = self.pipe.recv()
        except (EOFError, OSError):
            raise RankError("its process died") from None
        if not ok:
            raise RankError(content)
        return content

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, function: Callable[..., Iterator], arguments: tuple) -> None:
    items = function(*arguments)
    try:
        while pipe.recv():
            pipe.send((True, next(items)))
    except EOFError:
        return
    except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
        pipe.send((False, traceback.format_exc()))


@dataclass(frozen=True)
class Step:
    seconds: float
    loss: float  # mean over the action tokens, before the step


def transformers_steps(path: Path, samples: list[TrainSample], num_threads: int) -> Iterator[dict[str, Step]]:
    """AdamW steps, timed for each of two ways: one padded batch, and row by row (no padding). One of the two gradients is
    stepped along; both ways count the optimizer's time. sdpa attention, fused AdamW, the vocabulary only where tokens count.
    The inputs are made beforehand, pixels included."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    torch.set_num_threads(num_threads)
    logging.disable_progress_bar()
    family = family_of(path)
    assert isinstance(family, Qwen2_5_VL)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]  # Megatron decays no norms and no biases
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPSILON, fused=True)
    by_way = {"one padded batch": [samples], "row by row": [[sample] for sample in samples]}
    inputs = {way: [_inputs(family, rows) for rows in batches] for way, batches in by_way.items()}
    num_tokens = sum(sample.num_action_tokens for sample in samples)
    while True:
        seconds, losses = {}, {}
        for way, batches in inputs.items():
            optimizer.zero_grad()
            start = time.perf_counter()
            losses[way] = sum(_forward_backward(model, *batch, num_tokens) for batch in batches)
            seconds[way] = time.perf_counter() - start
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        step_s = time.perf_counter() - start
        yield {way: Step(seconds[way] + step_s, losses[way]) for way in inputs}


def _forward_backward(model, arguments: dict, predictors: tuple, targets: torch.Tensor, num_tokens: int) -> float:
    hidden = model.model(**arguments, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[predictors])
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_tokens
    loss.backward()
    return loss.item()


def _inputs(family: Qwen2_5_VL, rows: list[TrainSample]) -> tuple[dict, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """-> the model's arguments, (row, position) of what predicts every action token, and those tokens."""
    longest = max(row.num_tokens for row in rows)
    ids = torch.tensor([row.token_ids_T + [0] * (longest - row.num_tokens) for row in rows])
    own = torch.tensor([row.action_mask_T + [False] * (longest - row.num_tokens) for row in rows])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == family.image_token_id).int()}
    if len(rows) > 1:
        inputs["attention_mask"] = torch.tensor([[t < row.num_tokens for t in range(longest)] for row in rows]).long()
    if refs := [ref for row in rows for ref in row.images]:
        inputs["pixel_values"] = torch.cat([torch.from_numpy(family.patches(pixels(ref))) for ref in refs])
        inputs["image_grid_thw"] = torch.tensor([family.grid(ref) for ref in refs])
    row, position = own.nonzero(as_tuple=True)
    return inputs, (row, position - 1), ids[row, position]


# Megatron


@dataclass(frozen=True)
class PaddedLayout(Layout):
    """One rank whose packed samples are all padded to `multiple` tokens."""

    multiple: int = 1

    @property
    def segment_multiple(self) -> int:
        return self.multiple


class Trainer:
    """MegatronModel.update on the same rows, again and again."""

    def __init__(self, path: Path, layout: Layout, samples: list[TrainSample]) -> None:
        from megatron_agent.training.megatron import MegatronModel

        self.model, self.samples = MegatronModel(family_of(path), layout, ModelOptions("float32")), samples
        self.model.reset_optimizer(OptimizerOptions(LR, WEIGHT_DECAY, BETAS, CLIP))
        self.num_tokens = sum(sample.num_action_tokens for sample in samples)

    def plan(self, budget_tokens: int, min_microbatches: int = 1) -> list[list[int]]:
        layout = self.model.layout
        lengths = [padded_length(sample.num_tokens, layout.segment_multiple) for sample in self.samples]
        budget = max(budget_tokens, max(lengths))
        return interleavable(plan_microbatches(lengths, budget, layout.data_parallel, min_microbatches), layout)[0]

    def step(self, plan: list[list[int]]):
        """-> Step, LossStats. The pixels are made from the pictures within the step."""
        from megatron_agent.training.loss import Supervised

        start = time.perf_counter()
        stats, _ = self.model.update(self.samples, plan, pixels, Supervised(), BatchSize.of(self.samples), LR, 1.0)
        return Step(time.perf_counter() - start, stats.sums.get("loss", 0.0) / self.num_tokens), stats

    def loss(self, layout: Layout, budget_tokens: int) -> float:
        """Without a step."""
        self.model.layout = layout
        logprobs, _ = self.model.logprobs(self.samples, self.plan(budget_tokens), pixels, 1.0)
        return -sum(map(sum, logprobs.values())) / self.num_tokens


def _one_rank(num_threads: int, store: Path) -> None:
    import torch.distributed as dist

    from megatron_agent.training import cpu

    torch.set_num_threads(num_threads)
    cpu.install()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def megatron_steps(path: Path, samples: list[TrainSample], num_threads: int, budget_tokens: int, store: Path) -> Iterator[Step]:
    _one_rank(num_threads, store)
    trainer = Trainer(path, Layout(), samples)
    plan = trainer.plan(budget_tokens)
    while True:
        yield trainer.step(plan)[0]


def packed_and_padded_steps(
    path: Path, samples: list[TrainSample], num_threads: int, budget_tokens: int, store: Path
) -> Iterator[tuple[Step, Step, float, int, int]]:
    """Steps of one model: packed, then padded (every sample to the longest, as many tokens a micro-batch); the loss of the
    padded rows before all; micro-batches of each."""
    _one_rank(num_threads, store)
    trainer = Trainer(path, Layout(), samples)
    layouts = [Layout(), PaddedLayout(multiple=max(sample.num_tokens for sample in samples))]
    padded_loss = trainer.loss(layouts[1], budget_tokens)
    while True:
        steps, plans = [], []
        for layout in layouts:
            trainer.model.layout = layout
            plans.append(trainer.plan(budget_tokens))
            steps.append(trainer.step(plans[-1])[0])
        yield (*steps, padded_loss, *map(len, plans))


@dataclass(frozen=True)
class RankTimes:
    """Of the timed steps: the whole schedule, this rank's share of it spent computing, and the whole step."""

    schedule_s: list[float]
    busy_s: list[float]
    step_s: list[float]
    num_microbatches: int
    loss: float  # this rank's share, before the first step
    vision_imbalance: float


def timed_steps(path: Path, layout: Layout, samples: list[TrainSample], num_microbatches: int, num_steps: int) -> RankTimes:
    """On every rank of the layout's world, one thread each; collective. One step more than `num_steps` warms up."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    trainer = Trainer(path, layout, samples)
    budget = -(-sum(sample.num_tokens for sample in samples) // num_microbatches)
    plan = trainer.plan(budget, num_microbatches)
    first, stats = trainer.step(plan)
    schedule, busy, steps = [], [], []
    with _timed_schedule() as seconds:
        for _ in range(num_steps):
            dist.barrier()
            seconds.update(schedule=0.0, busy=0.0)
            steps.append(trainer.step(plan)[0].seconds)
            schedule.append(seconds["schedule"])
            busy.append(seconds["busy"])
    loss = first.loss if trainer.model.is_reporter else 0.0
    return RankTimes(schedule, busy, steps, len(plan), loss, stats.maxima.get("vision_imbalance", 1.0))


@contextmanager
def _timed_schedule() -> Iterator[dict[str, float]]:
    """Seconds in Megatron's schedule, and in its forward and backward steps: the rest of it waits for other stages."""
    from megatron.core import pipeline_parallel
    from megatron.core.pipeline_parallel import schedules

    seconds = {"schedule": 0.0, "busy": 0.0}

    def timed(function: Callable, name: str) -> Callable:
        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return wrapped

    originals = schedules.forward_step, schedules.backward_step, pipeline_parallel.get_forward_backward_func
    schedules.forward_step, schedules.backward_step = (timed(function, "busy") for function in originals[:2])
    pipeline_parallel.get_forward_backward_func = lambda: timed(originals[2](), "schedule")
    try:
        yield seconds
    finally:
        schedules.forward_step, schedules.backward_step, pipeline_parallel.get_forward_backward_func = originals
