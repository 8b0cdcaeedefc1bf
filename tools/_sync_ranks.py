"""What runs in the processes of tools/bench_weight_sync.py: trainer ranks, engines and receivers that can be looked into,
and the other route, on which full tensors are gathered and handed to vLLM's `load_weights`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_agent.models.mapping import as_index
from megatron_agent.rollout.engine import Engine
from megatron_agent.rollout.worker_extension import WorkerExtension
from megatron_agent.training.worker import Worker
from megatron_agent.types import ShardCopy, SyncRound

COUNTER_BYTES = 64  # at the start of a Region: how many bytes of it are there
POLL_S = 0.0002


def timed(function: Callable, seconds: Counter, name: str) -> Callable:
    def call(*arguments: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds[name] += time.perf_counter() - began_s

    return call


class Probe:
    """Seconds and memory of weight syncs in the process that it is made in."""

    def __init__(self) -> None:
        from megatron_agent.weights import transport

        self.seconds: Counter = Counter()
        self.transport, self.checksum = transport, transport.checksum

    def start(self, verify: bool) -> None:
        """Forget what was. `verify` False: no checksums are taken, and none is found to differ."""
        self.seconds.clear()
        self.transport.checksum = timed(self.checksum if verify else lambda tensor: 0, self.seconds, "sums")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory starts anew
        self.rss_bytes = resident_bytes("VmRSS")

    def read(self) -> dict[str, float]:
        """Seconds by part, and by how many bytes the process has grown at most, memory that it shares included."""
        return {**self.seconds, "peak_bytes": resident_bytes("VmHWM") - self.rss_bytes}


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


@dataclass(frozen=True)
class Region:
    """Memory that two processes share, room for a whole model: (name, shape, first byte) of every tensor, in the order in
    which they come."""

    file: str
    num_bytes: int
    dtype: str
    tensors: tuple[tuple[str, tuple[int, ...], int], ...]

    def open(self) -> torch.Tensor:
        return torch.from_file(self.file, shared=True, size=self.num_bytes, dtype=torch.uint8)

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = getattr(torch, self.dtype)
        found = {}
        for name, shape, first in self.tensors:
            count = torch.Size(shape).numel() * dtype.itemsize
            found[name] = memory[first : first + count].view(dtype).view(shape)
        return found


class SyncWorker(Worker):
    """A trainer rank."""

    def set_up(self, *arguments: Any) -> None:
        super().set_up(*arguments)
        for chunk in self.model.ddp:  # nothing is trained: the gradients' and the optimizer's memory goes
            for buffer in chunk.buffers:
                buffer.grad_data.untyped_storage().resize_(0)
        del self.model.optimizer
        self.model.config.grad_scale_func = None
        self.probe = Probe()

    def start_probe(self, verify: bool = True) -> None:
        self.probe.start(verify)

    def read_probe(self) -> dict[str, float]:
        return self.probe.read()

    def send_weights(self, *arguments: Any) -> dict[int, str]:
        return timed(super().send_weights, self.probe.seconds, "send")(*arguments)

    @torch.no_grad()
    def disturb(self, scale: float) -> None:
        """Other weights, the same on every rank that holds them."""
        for parameter in self.model.module.parameters():
            parameter.mul_(scale)

    @torch.no_grad()
    def gather(self, region: Region) -> None:
        """The peers' way: every tensor whole on rank 0, which writes it under its Hugging Face name where the receiver reads
        it. Nothing is copied that need not be: shards go from the collective's buffers to their place."""
        import torch.distributed as dist

        from megatron_agent.training.layout import is_tensor_parallel, megatron_pieces

        table = self.family.table(self.layout, transformer_engine=False)
        ranks = range(self.layout.world_size)
        pieces = [megatron_pieces(table, self.layout, self.family.num_layers, rank) for rank in ranks]
        split = {p.param for p in pieces[0] if is_tensor_parallel(p, table)}
        memory = region.open()
        tensors, counter = region.views(memory), memory[:8].view(torch.int64)
        ends = {name: first + tensors[name].nbytes for name, _, first in region.tensors}
        parameters = dict(self.model.module.named_parameters())
        for name in dict.fromkeys(p.param for p in pieces[0]):
            parameter = parameters[name]
            shards = [parameter.data]
            if name in split and len(ranks) > 1:
                shards = [torch.empty_like(parameter.data) for _ in ranks]
                dist.all_gather(shards, parameter.data.contiguous())
            if self.rank:
                continue
            for rank, shard in enumerate(shards):
                for piece in (p for p in pieces[rank] if p.param == name):
                    tensors[piece.hf_name][as_index(piece.hf_slice)].copy_(shard[as_index(piece.param_slice)])
            counter[0] = max(ends[p.hf_name] for p in pieces[0] if p.param == name)


class SyncExtension(WorkerExtension):
    """vLLM's worker."""

    weight_transfer_engine: Any
    vllm_config: Any
    model_config: Any

    def start_probe(self, verify: bool = True) -> None:
        if not hasattr(self, "probe"):
            self.probe = Probe()
            for name in ("receive_weights", "write", "written"):
                method = getattr(self.weight_transfer_engine, name)
                setattr(self.weight_transfer_engine, name, timed(method, self.probe.seconds, name))
        self.probe.start(verify)

    def read_probe(self) -> dict[str, float]:
        return self.probe.read()

    def load_gathered(self, region_as_dict: dict) -> None:
        """vLLM's own way to new weights: its layerwise reload around `load_weights`."""
        region = Region(**region_as_dict)
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        memory = region.open()
        tensors, counter = region.views(memory), memory[:8].view(torch.int64)

        def arriving() -> Iterator[tuple[str, torch.Tensor]]:
            for name, _, first in region.tensors:
                while int(counter[0]) < first + tensors[name].nbytes:
                    time.sleep(POLL_S)
                yield name, tensors[name]

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            reload.initialize_layerwise_reload(model)
            model.load_weights(arriving())
            reload.finalize_layerwise_reload(model, self.model_config)
            for module in model.modules():  # a tied head's packed copy of the embedding, which the reload forgets
                if hasattr(module, "cpu_linear") and module.weight.numel():
                    module.quant_method.process_weights_after_loading(module)


class SyncEngine(Engine):
    """The engine, with the other route beside its own."""

    async def start_probe(self, verify: bool = True) -> None:
        await self.llm.collective_rpc("start_probe", args=(verify,))

    async def read_probe(self) -> list[dict[str, float]]:
        return await self.llm.collective_rpc("read_probe")

    async def sync_gathered(self, region: Region) -> None:
        """`sync_weights`, with gathered tensors in the middle."""
        await self.llm.pause_generation(mode="keep", clear_cache=False)
        await self.llm.collective_rpc("load_gathered", args=(asdict(region),))
        await self.llm.reset_prefix_cache(reset_running_requests=True)
        await self.llm.reset_mm_cache()
        await self.llm.reset_encoder_cache()
        await self.llm.resume_generation()


class PlainEngine:
    """A rollout rank that only holds its parameters: the transport without an inference engine behind it."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.parameters = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}
        self.probe = Probe()

    def init_weight_transfer(self, info: dict[str, Any]) -> None:
        from megatron_agent.weights.plan import from_plain

        (rows,) = info["copies"]
        self.copies = from_plain(rows)

    def places(self) -> list[tuple[str, str]]:
        from megatron_agent.weights.meeting import place

        return [place()]

    def describe(self) -> list[dict[str, tuple[int, ...]]]:
        return [{name: tuple(parameter.shape) for name, parameter in self.parameters.items()}]

    def start_probe(self, verify: bool = True) -> None:
        self.probe.start(verify)

    def read_probe(self) -> dict[str, float]:
        return self.probe.read()

    def sync_weights(self, update: dict[str, Any], version: int) -> None:
        from megatron_agent.weights.meeting import Meeting
        from megatron_agent.weights.transport import receive_all

        meeting = Meeting(SyncRound(**update["sync_round"]))
        timed(receive_all, self.probe.seconds, "receive_weights")(meeting, self.copies[0].dst_rank, self.copies, self)

    def write(self, copy: ShardCopy, values: torch.Tensor) -> torch.Tensor:
        place = self.parameters[copy.dst_param][as_index(copy.dst_slice)]
        place.copy_(values)
        return place

    def written(self, copy: ShardCopy) -> None:
        pass

    def is_alive(self) -> bool:
        return True

    async def until_dead(self) -> None:
        await asyncio.Event().wait()
