"""The trainer as the driver sees it: all Megatron ranks behind one object. Importing it loads nothing heavy."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_agent.errors import ConfigError, TrainingError, cause_of
from megatron_agent.training.layout import Layout
from megatron_agent.types import ShardCopy, TrainSample

if TYPE_CHECKING:
    from megatron_agent.algorithms.base import Algorithm
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
    recompute: str = "none"  # activations recomputed in the backward pass: none, selective (attention), full (layers)
    num_steps: int = 100
    prompts_per_step: int = 32
    minibatches_per_step: int = 1
    max_tokens_per_microbatch: int = 8192
    dtype: str = "float32"
    num_cpu_threads: int = 1
    lr: float = 1e-6
    warmup_steps: int = 0
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
        )
        if self.recompute not in ("none", "selective", "full"):
            raise ConfigError(f"training.recompute={self.recompute!r}; allowed: none, selective, full")
        for name in ("num_steps", "warmup_steps"):
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
        """Rate of update `step`, counted from 1: linear warm-up, then constant."""
        return self.lr * min(1.0, step / self.warmup_steps) if self.warmup_steps else self.lr


class Actor:
    """Handles of the ranks' Ray actors, in rank order. Every method is a collective over all of them.

    waits for: all ranks; the first that fails fails the call, and the others may hang in a collective: the caller stops
    the run. Raises TrainingError naming the rank.
    """

    def __init__(self, workers: Sequence[Any], config: TrainingConfig) -> None:
        self.workers, self.config, self.layout = list(workers), config, config.layout

    async def set_up(self, family: str, model_path: str, seed: int) -> None:
        address = await self.workers[0].address.remote()
        await self._all("set_up", address, family, model_path, self.config.dtype, self.config.recompute, seed)

    async def reset_optimizer(self, lr: float, clip_grad: float) -> None:
        await self._all("reset_optimizer", lr, self.config.weight_decay, tuple(self.config.betas), clip_grad)

    async def update(
        self, samples: list[TrainSample], algorithm: Algorithm, lr: float, num_minibatches: int = 1, temperature: float = 1.0
    ) -> dict[str, float]:
        """`num_minibatches` optimizer steps over the samples, whole groups kept in one -> metrics of the step.

        With one mini-batch the ratio's old log-probs are those of the update's own forward pass (it is 1, exactly);
        with more they are computed first, under the weights before the first. `temperature` is the one that was sampled
        at: log-probs are of that distribution. No samples: nothing happens.
        """
        import ray

        from megatron_agent.training.loss import LossStats

        if not samples:
            return {}
        gap: LossStats | None = None
        if num_minibatches > 1:
            gap = await self._fill_old_logprobs(samples, temperature)
        total, norms = LossStats(), []
        for part in minibatches(samples, num_minibatches):
            plan = self._plan(part)
            tokens = sum(sample.num_action_tokens for sample in part)
            results = await self._all("update", ray.put(part), plan, algorithm, tokens, lr, temperature)
            for stats, _ in results:
                if stats is not None:
                    total.merge(stats)
            norms.append(results[0][1])
        metrics = total.means()
        if gap is not None:
            metrics |= gap.means()
        num_tokens = sum(sample.num_tokens for sample in samples)
        return metrics | {"grad_norm": sum(norms) / len(norms), "lr": lr, "train_tokens": float(num_tokens)}

    async def _fill_old_logprobs(self, samples: list[TrainSample], temperature: float) -> LossStats:
        import ray

        from megatron_agent.training.loss import LossStats

        gap = LossStats()
        for found, stats in await self._all("logprobs", ray.put(samples), self._plan(samples), temperature):
            gap.merge(stats)
            for index, values in found.items():
                of_actions = iter(values)
                samples[index].old_logprobs_T = [next(of_actions) if own else 0.0 for own in samples[index].action_mask_T]
        return gap

    def _plan(self, samples: list[TrainSample]) -> list[list[list[int]]]:
        from megatron_agent.training.packing import padded_length, plan_microbatches

        # Twice as many micro-batches as stages keep every stage of a pipeline busy for most of the step.
        fewest = 1 if self.layout.pipeline_parallel == 1 else 2 * self.layout.pipeline_parallel
        lengths = [padded_length(sample.num_tokens, self.layout.segment_multiple) for sample in samples]
        plan = plan_microbatches(lengths, self.config.max_tokens_per_microbatch, self.layout.data_parallel, fewest)
        return interleavable(plan, self.layout)

    async def send_weights(self, plan: list[ShardCopy], folder: Path) -> list[int]:
        """Every rank writes its shards -> checksums in plan order."""
        import ray

        sums = await self._all("send_weights", ray.put(plan), str(folder))
        of_rank = [iter(rank_sums) for rank_sums in sums]
        return [next(of_rank[copy.src_rank]) for copy in plan]

    async def save(self, folder: Path) -> None:
        await self._all("save", str(folder.absolute()))

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
