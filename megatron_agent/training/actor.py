"""The trainer as the driver sees it: all Megatron ranks behind one object. Importing it loads nothing heavy."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_agent.errors import ConfigError, TrainingError, cause_of
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.types import ALL_TOKENS, BatchSize, ShardCopy, Support, SyncRound, TrainSample

if TYPE_CHECKING:
    from megatron_agent.algorithms.base import Algorithm
    from megatron_agent.training.critic import ValueObjective
    from megatron_agent.training.loss import LossStats


@dataclass
class TrainingConfig:
    """Megatron's degrees, the batch and the optimizer. Rates are Adam's; `clip_grad` is the norm (0: off)."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    virtual_pipeline: int = 1
    sequence_parallel: bool = False
    stage_layers: list[int] = field(default_factory=list)  # layers of every stage (of every chunk with a virtual pipeline,
    # in the model's order); empty: dealt so that the stage with the vision tower and that with the head take fewer
    recompute: str = "none"  # activations recomputed in the backward pass: none, selective (attention), full (layers)
    offload: str = "none"  # to host memory while the engines work: none, optimizer (with gradients), all (parameters too)
    frozen: str = ""  # what gets no gradient: nothing, "vision" (the tower), "language" (all but the tower)
    num_steps: int = 100
    prompts_per_step: int = 32
    minibatches_per_step: int = 1
    max_staleness: int = 1  # train_async: weight versions that the oldest token of a step may be behind; 0: no overlap
    max_tokens_per_microbatch: int = 8192
    dtype: str = "float32"
    num_cpu_threads: int = 1
    lr: float = 1e-6
    warmup_steps: int = 0
    lr_schedule: str = "constant"  # after the warm-up, to num_steps: constant, linear, cosine
    min_lr_fraction: float = 0.0  # of lr, where linear and cosine end
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_grad: float = 1.0
    logprob_gap_alarm: float = 0.05  # mean |log-prob(vLLM) - log-prob(trainer)| above which the run says so loudly

    def __post_init__(self) -> None:
        self.layout = Layout(
            self.tensor_parallel,
            self.pipeline_parallel,
            self.data_parallel,
            self.context_parallel,
            self.sequence_parallel,
            self.virtual_pipeline,
            tuple(self.stage_layers),
        )
        if self.recompute not in ("none", "selective", "full"):
            raise ConfigError(f"training.recompute={self.recompute!r}; allowed: none, selective, full")
        if self.offload not in ("none", "optimizer", "all"):
            raise ConfigError(f"training.offload={self.offload!r}; allowed: none, optimizer, all")
        if self.frozen not in ("", "vision", "language"):
            raise ConfigError(f"training.frozen={self.frozen!r}; allowed: '' (nothing), vision, language")
        if self.lr_schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"training.lr_schedule={self.lr_schedule!r}; allowed: constant, linear, cosine")
        if not 0 <= self.min_lr_fraction <= 1:
            raise ConfigError(f"training.min_lr_fraction={self.min_lr_fraction} must lie between 0 and 1")
        for name in ("num_steps", "warmup_steps", "max_staleness"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}={getattr(self, name)} must be 0 or more")
        for name in ("prompts_per_step", "minibatches_per_step", "max_tokens_per_microbatch", "num_cpu_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)} must be 1 or more")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"training.dtype={self.dtype!r}; allowed: float32, bfloat16")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas={self.betas}: two numbers in [0, 1)")
        if not (0 < self.lr < math.inf and self.clip_grad >= 0):
            raise ConfigError(f"training.lr={self.lr} must be above 0, training.clip_grad={self.clip_grad} 0 (off) or more")

    def lr_at(self, step: int) -> float:
        """Rate of step `step`, counted from 1: linear warm-up, then `lr_schedule` down to `min_lr_fraction` at the last."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))
        left = 1 - done if self.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * (self.min_lr_fraction + (1 - self.min_lr_fraction) * left)


@dataclass
class VisionSection:
    """How the vision tower is trained. `lr` 0: training.lr; else its own rate, on the same schedule (in the warm start,
    in the same proportion). `replicate`: every tensor and context rank encodes all pictures, instead of some of them."""

    lr: float = 0.0
    replicate: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise ConfigError(f"vision.lr={self.lr} must be 0 (that of training) or more; to freeze the tower: training.frozen")


class Actor:
    """Handles of the ranks' Ray actors, in rank order. Every method is a collective over all of them.

    waits for: all ranks; the first that fails fails the call, and the others may hang in a collective: the caller stops
    the run. Raises TrainingError naming the rank. Log-probs are those of sampling from `support`.
    """

    head = "policy"

    def __init__(self, workers: Sequence[Any], config: TrainingConfig, frozen: str = "", support: Support = ALL_TOKENS) -> None:
        """`frozen` in place of `config.frozen`: "all" for a model that is only asked for log-probs."""
        self.workers, self.config, self.layout = list(workers), config, config.layout
        self.frozen, self.support = frozen, support

    async def set_up(self, family: str, model_path: str, seed: int, vision: VisionSection) -> None:
        address = await self.workers[0].address.remote()
        frozen = self.frozen or self.config.frozen
        options = ModelOptions(
            self.config.dtype, seed, self.config.recompute, self.head, frozen, vision.replicate, self.support
        )
        self.vision_lr_scale = vision.lr / self.config.lr if vision.lr else 1.0
        await self._all("set_up", address, family, model_path, options, self.config.offload)

    async def reset_optimizer(self, lr: float, clip_grad: float) -> None:
        first, second = self.config.betas
        options = OptimizerOptions(lr, self.config.weight_decay, (first, second), clip_grad, self.vision_lr_scale)
        await self._all("reset_optimizer", options)

    async def update(
        self, samples: list[TrainSample], algorithm: Algorithm, lr: float, num_minibatches: int = 1, temperature: float = 1.0
    ) -> dict[str, float]:
        """`num_minibatches` optimizer steps over the samples, whole groups kept in one -> metrics of the step.

        With one mini-batch the ratio's old log-probs are those of the update's own forward pass (it is 1, exactly);
        with more they are computed first, under the weights before the first, unless the samples have them.
        `temperature` is the one that was sampled at: log-probs are of that distribution. No samples: nothing happens.
        "first/...": of the first mini-batch, where ratios are 1 and nothing is clipped (under `clip`: those of fresh tokens).
        """
        if not samples:
            return {}
        await self.to_device()
        gap: LossStats | None = None
        if num_minibatches > 1 and any(sample.old_logprobs_T is None for sample in samples):
            gap = await self.fill_old_logprobs(samples, temperature)
        total, norms, first = await self._take_steps(samples, algorithm, lr, num_minibatches, temperature)
        metrics = total.means()
        metrics |= {f"first/{name}": first[name] for name in ("ratio_deviation_max", "clip_fraction") if name in first}
        if gap is not None:
            metrics |= gap.means()
        num_tokens = sum(sample.num_tokens for sample in samples)
        return metrics | norms | {"lr": lr, "train_tokens": float(num_tokens)}

    async def _take_steps(
        self,
        samples: list[TrainSample],
        algorithm: Algorithm | ValueObjective,
        lr: float,
        num_minibatches: int,
        temperature: float,
    ) -> tuple[LossStats, dict[str, float], dict[str, float]]:
        """-> statistics of all action tokens, norms (means of the steps), means of the first step."""
        import ray

        from megatron_agent.training.loss import LossStats

        total, norms = LossStats(), []
        first: dict[str, float] = {}
        for part in minibatches(samples, num_minibatches):
            plan = self._plan(part)
            results = await self._all("update", ray.put(part), plan, algorithm, BatchSize.of(part), lr, temperature)
            for stats, _ in results:
                total.merge(stats)
            norms.append(results[0][1])
            first = first or total.means()
        return total, {name: statistics.fmean(of_step[name] for of_step in norms) for name in norms[0]}, first

    async def to_device(self) -> None:
        """What is offloaded comes back, for several calls that need it (each fetches what it needs itself)."""
        if self.config.offload != "none":
            await self._all("to_device")

    async def to_host(self) -> None:
        """Leave the device to the engines, as far as `training.offload` says."""
        if self.config.offload != "none":
            await self._all("to_host")

    async def keep_reference(self, folder: Path | None = None) -> None:
        """From now on the reference is the policy as it is, or with the weights saved in `folder`, which it then has."""
        await self._all("keep_reference", None if folder is None else str(folder.absolute()))

    async def load_weights(self, folder: Path) -> None:
        """Of a policy's training checkpoint, without its optimizer."""
        await self._all("load_weights", str(folder.absolute()))

    async def fill_old_logprobs(self, samples: list[TrainSample], temperature: float) -> LossStats:
        """`old_logprobs_T` of every sample -> how far they are from the engine's."""
        found, gap = await self._per_token(samples, temperature)
        for index, logprobs_T in found.items():
            samples[index].old_logprobs_T = logprobs_T
        return gap

    async def fill_reference_logprobs(self, samples: list[TrainSample], temperature: float, own: bool) -> None:
        """`reference_logprobs_T` of every sample: of the weights that are (a teacher's), or of those kept (`own`)."""
        found, _ = await self._per_token(samples, temperature, "reference_logprobs" if own else "logprobs")
        for index, logprobs_T in found.items():
            samples[index].reference_logprobs_T = logprobs_T

    async def _per_token(
        self, samples: list[TrainSample], temperature: float, method: str = "logprobs"
    ) -> tuple[dict[int, list[float]], LossStats]:
        """Sample index -> what the model says of each action token, 0 elsewhere [T]; and the ranks' statistics."""
        import ray

        from megatron_agent.training.loss import LossStats

        stats, rows = LossStats(), {}
        for found, of_rank in await self._all(method, ray.put(samples), self._plan(samples), temperature):
            stats.merge(of_rank)
            for index, values in found.items():
                of_actions = iter(values)
                rows[index] = [next(of_actions) if own else 0.0 for own in samples[index].action_mask_T]
        return rows, stats

    def _plan(self, samples: list[TrainSample]) -> list[list[list[int]]]:
        from megatron_agent.training.packing import padded_length, plan_microbatches

        # Twice as many micro-batches as stages keep every stage of a pipeline busy for most of the step.
        fewest = 1 if self.layout.pipeline_parallel == 1 else 2 * self.layout.pipeline_parallel
        lengths = [padded_length(sample.num_tokens, self.layout.segment_multiple) for sample in samples]
        plan = plan_microbatches(lengths, self.config.max_tokens_per_microbatch, self.layout.data_parallel, fewest)
        return interleavable(plan, self.layout)

    async def places(self) -> list[tuple[str, str]]:
        """(host, device) of every rank."""
        return await self._all("place")

    async def set_receivers(self, copies: Sequence[list[ShardCopy]]) -> None:
        """`copies[rank]`: what a rank sends in every weight sync."""
        calls = [worker.set_receivers.remote(mine) for worker, mine in zip(self.workers, copies, strict=True)]
        await asyncio.gather(*(self._one(rank, call) for rank, call in enumerate(calls)))

    async def send_weights(self, sync_round: SyncRound, only: frozenset[int] | None = None) -> dict[int, str]:
        """Every rank sends its shards to the rollout ranks (of `only`) -> rollout rank: why it did not get them."""
        return {rank: why for lost in await self._all("send_weights", sync_round, only) for rank, why in lost.items()}

    async def save(self, folder: Path) -> None:
        """Every rank copies its state; its files and part (snapshot.py) in `folder` follow while it works on."""
        await self._all("save", str(folder.absolute()))

    async def check_save(self) -> None:
        """Raises CheckpointError if a rank could not write."""
        await self._all("check_save")

    async def finish_save(self) -> None:
        """Until every rank has written its part. Raises CheckpointError."""
        await self._all("finish_save")

    async def load(self, folder: Path) -> None:
        await self._all("load", str(folder.absolute()))

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        return list(await asyncio.gather(*(self._one(rank, call) for rank, call in enumerate(calls))))

    async def _one(self, rank: int, call: Awaitable[Any]) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await call
        except RayActorError as error:
            raise TrainingError(f"trainer rank {rank} died: {error}") from error
        except RayTaskError as error:
            raise cause_of(error, TrainingError) from None


def interleavable(plan: list[list[list[int]]], layout: Layout) -> list[list[list[int]]]:
    """With a virtual pipeline Megatron wants a multiple of the stages: empty micro-batches make it up."""
    if layout.virtual_pipeline == 1:
        return plan
    return [batches + [[] for _ in range(-len(batches) % layout.pipeline_parallel)] for batches in plan]


def minibatches(samples: list[TrainSample], count: int) -> list[list[TrainSample]]:
    """`count` parts of about equal numbers of groups, in order; a group stays whole."""
    groups = [list(members) for _, members in itertools.groupby(samples, key=lambda sample: sample.group_id)]
    bounds = [round(i * len(groups) / count) for i in range(count + 1)]
    parts = [list(itertools.chain(*groups[a:b])) for a, b in zip(bounds, bounds[1:])]
    return [part for part in parts if part]
