"""One Megatron rank in a process of its own: what cluster.py makes Ray actors of."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np

from megatron_agent import registry
from megatron_agent.algorithms.base import Algorithm
from megatron_agent.data.images import ImageStore
from megatron_agent.models.base import ModelFamily
from megatron_agent.training.layout import Layout
from megatron_agent.types import ImageRef, ShardCopy, TrainSample

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Worker:
    """consumes: samples and micro-batch plans from the driver. waits for: its peers, inside every collective.
    unblocked by: the slowest rank. produces: loss statistics, log-probs, weight shards, checkpoints."""

    def __init__(self, rank: int, layout: Layout, store: ImageStore, num_threads: int) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps by issue order
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        import torch

        torch.set_num_threads(num_threads)
        self.rank, self.layout, self.store = rank, layout, store

    def address(self) -> tuple[str, int]:
        """A host name and a free port on this node, where rank 0 can be met."""
        import ray

        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def set_up(
        self,
        address: tuple[str, int],
        family_name: str,
        model_path: str,
        dtype: str,
        recompute: str,
        seed: int,
    ) -> None:
        """Join the process group and load this rank's shard of the checkpoint."""
        import torch
        import torch.distributed as dist

        from megatron_agent.training import cpu

        cpu.install()
        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.layout.world_size, timeout=COLLECTIVE_TIMEOUT)
        from megatron_agent.training.megatron import MegatronModel

        self.family: ModelFamily = registry.resolve("models", family_name)(model_path)
        self.model = MegatronModel(self.family, self.layout, dtype, seed, recompute)

    def reset_optimizer(self, lr: float, weight_decay: float, betas: tuple[float, float], clip_grad: float) -> None:
        self.model.reset_optimizer(lr, weight_decay, betas, clip_grad)

    def update(
        self,
        samples: list[TrainSample],
        plan: list[list[list[int]]],
        algorithm: Algorithm,
        denominator_tokens: int,
        lr: float,
        temperature: float,
    ):
        """-> (LossStats, gradient norm), statistics of reporters only. `plan` is indexed by data-parallel rank."""
        stats, norm = self.model.update(samples, self._mine(plan), self._pixels, algorithm, denominator_tokens, lr, temperature)
        return (stats if self.model.is_reporter else None), norm

    def logprobs(self, samples: list[TrainSample], plan: list[list[list[int]]], temperature: float):
        """-> (sample index -> log-probs of its action tokens, LossStats) on reporters, else empty."""
        return self.model.logprobs(samples, self._mine(plan), self._pixels, temperature)

    def send_weights(self, plan: list[ShardCopy], folder: str) -> list[int]:
        """This rank's part of a weight transfer -> checksums in plan order."""
        from megatron_agent.weights.sender import send

        return send(self.model.module, plan, self.rank, Path(folder))

    def save(self, folder: str) -> None:
        from megatron_agent.training.checkpoint import save_megatron

        save_megatron(self.model, Path(folder))

    def load(self, folder: str) -> None:
        from megatron_agent.training.checkpoint import load_megatron

        load_megatron(self.model, Path(folder))

    def _mine(self, plan: list[list[list[int]]]) -> list[list[int]]:
        return plan[self.model.at.data]

    def _pixels(self, ref: ImageRef) -> np.ndarray:
        return self.store.pixels(ref)
