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
from megatron_agent.training.critic import ValueObjective
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.types import BatchSize, ImageRef, ShardCopy, SyncRound, TrainSample

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
        options: ModelOptions,
        offload: str,
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
        from megatron_agent.training.offload import Offload
        from megatron_agent.training.snapshot import Saver

        self.family: ModelFamily = registry.resolve("models", family_name)(model_path)
        self.model = MegatronModel(self.family, self.layout, options)
        self.saver = Saver(self.model)
        self.offload = Offload(self.model, offload)

    def to_device(self) -> None:
        self.offload.to_device()

    def to_host(self) -> None:
        self.offload.to_host()

    def reset_optimizer(self, options: OptimizerOptions) -> None:
        with self.offload.on_device("all"):
            self.model.reset_optimizer(options)

    def update(
        self,
        samples: list[TrainSample],
        plan: list[list[list[int]]],
        algorithm: Algorithm | ValueObjective,
        size: BatchSize,
        lr: float,
        temperature: float,
    ):
        """-> (LossStats, gradient and weight norms); statistics of others than reporters are the vision's balance only.
        `plan` is indexed by data-parallel rank."""
        mine = self._mine(plan)
        with self.offload.on_device("all"):
            stats, norms = self.model.update(samples, mine, self._pixels, algorithm, size, lr, temperature)
        return (stats if self.model.is_reporter else stats.only("vision_imbalance")), norms

    def logprobs(self, samples: list[TrainSample], plan: list[list[list[int]]], temperature: float):
        """-> (sample index -> log-probs or values of its action tokens, LossStats) on reporters, else empty."""
        with self.offload.on_device("parameters"):
            return self.model.logprobs(samples, self._mine(plan), self._pixels, temperature)

    def keep_reference(self, folder: str | None) -> None:
        """The reference is the model as it is, or with the weights of a checkpoint, which it then keeps."""
        if folder is not None:
            self.load_weights(folder)
        with self.offload.on_device("parameters"):
            self.model.reference.keep()

    def reference_logprobs(self, samples: list[TrainSample], plan: list[list[list[int]]], temperature: float):
        """`logprobs` under the reference's weights."""
        with self.offload.on_device("parameters"), self.model.reference.in_place():
            return self.model.logprobs(samples, self._mine(plan), self._pixels, temperature)

    def place(self) -> tuple[str, str]:
        """(host, device), as weights/topology.py counts them."""
        from megatron_agent.weights.sender import place

        return place()

    def set_receivers(self, copies: list[ShardCopy]) -> None:
        self.copies = copies

    def send_weights(self, sync_round: SyncRound, only: frozenset[int] | None = None) -> dict[int, str]:
        """This rank's part of a weight transfer -> rollout rank: why it did not get its bytes."""
        from megatron_agent.weights.sender import send

        with self.offload.on_device("parameters"):
            return send(self.model.module, self.copies, sync_round, only)

    def save(self, folder: str) -> None:
        with self.offload.on_device("all"):
            self.saver.start(Path(folder))

    def check_save(self) -> None:
        self.saver.is_writing()

    def finish_save(self) -> None:
        self.saver.wait()

    def load(self, folder: str) -> None:
        from megatron_agent.training.checkpoint import load_megatron

        with self.offload.on_device("all"):
            load_megatron(self.model, Path(folder))

    def load_weights(self, folder: str) -> None:
        """Those of a policy's training checkpoint, without its optimizer; also into a critic."""
        from megatron_agent.training.checkpoint import load_weights

        with self.offload.on_device("all"):
            load_weights(self.model, Path(folder))

    def _mine(self, plan: list[list[list[int]]]) -> list[list[int]]:
        return plan[self.model.at.data]

    def _pixels(self, ref: ImageRef) -> np.ndarray:
        return self.store.pixels(ref)
