"""What bench_checkpoint.py and kill_checkpoints.py run: a tiny Qwen2.5-VL, trained by real gloo ranks behind pipes."""

from __future__ import annotations

import asyncio
import json
import os
import time
import zlib
from datetime import timedelta
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_agent.config import CheckpointSection, ModelSection, RunConfig
from megatron_agent.errors import CheckpointError, TrainingError
from megatron_agent.models.qwen2_5_vl import Qwen2_5_VL
from megatron_agent.training.actor import TrainingConfig
from megatron_agent.training.dist_checkpoint import checkpoint_table, shapes_of
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.layout import Layout
from megatron_agent.training.options import ModelOptions, OptimizerOptions
from megatron_agent.types import BatchSize, TrainSample

LAYOUTS = {
    "tp2": Layout(tensor_parallel=2),
    "pp2": Layout(pipeline_parallel=2),
    "dp2": Layout(data_parallel=2),
    "tp2pp2": Layout(tensor_parallel=2, pipeline_parallel=2),
}
VOCAB_SIZE = 2048


def write_model(folder: Path, hidden_size: int, num_layers: int) -> int:
    """A Hugging Face folder with random float32 weights -> its number of parameters."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = dict(
        model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], torch_dtype="float32",
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32, num_key_value_heads=2, vocab_size=VOCAB_SIZE, rms_norm_eps=1e-6,
        rope_theta=1e6, max_position_embeddings=4096, tie_word_embeddings=True, image_token_id=VOCAB_SIZE - 1,
        rope_scaling=dict(type="mrope", mrope_section=[4, 6, 6]),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=hidden_size, patch_size=14,
            temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=[0], in_chans=3,
        ),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = shapes_of(checkpoint_table(read_family(folder)))
    tensors = {name: 0.02 * torch.randn(shape) + (1.0 if "norm" in name else 0.0) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(map(prod, shapes.values()))


def run_config(model: Path, out: Path, layout: Layout, **checkpoint: Any) -> RunConfig:
    degrees = TrainingConfig(layout.tensor_parallel, layout.pipeline_parallel, layout.data_parallel)
    options = CheckpointSection(**checkpoint)
    return RunConfig(out.name, str(out.parent), model=ModelSection(str(model)), training=degrees, checkpoint=options)


def make_samples(count: int, num_tokens: int) -> list[TrainSample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for row in range(count):
        ids = torch.randint(0, VOCAB_SIZE - 1, (num_tokens,), generator=generator).tolist()
        own = [t >= num_tokens // 2 for t in range(num_tokens)]
        zeros = [0.0] * num_tokens
        samples.append(TrainSample(ids, own, zeros, [float(o) for o in own], [], str(row), 0.0, [False] * num_tokens))
    return samples


class Rank:
    """One rank: what a Worker does, on made-up rows."""

    def __init__(self, path: Path, layout: Layout, num_rows: int, num_tokens: int) -> None:
        from megatron_agent.training.megatron import MegatronModel
        from megatron_agent.training.packing import plan_microbatches
        from megatron_agent.training.snapshot import Saver

        self.model = MegatronModel(Qwen2_5_VL(path), layout, ModelOptions("float32"))
        self.model.reset_optimizer(OptimizerOptions(1e-3, 0.01, (0.9, 0.95), 1.0))
        self.saver = Saver(self.model)
        self.samples = make_samples(num_rows, num_tokens)
        fewest = 1 if layout.pipeline_parallel == 1 else layout.pipeline_parallel
        plan = plan_microbatches([num_tokens] * num_rows, num_tokens, layout.data_parallel, fewest)
        self.plan = plan[self.model.at.data]

    def step(self) -> float:
        """One update of cross-entropy -> seconds."""
        from megatron_agent.training.loss import Supervised

        began_s = time.perf_counter()
        self.model.update(self.samples, self.plan, lambda ref: None, Supervised(), BatchSize.of(self.samples), 1e-3, 1.0)
        return time.perf_counter() - began_s

    def save(self, folder: Path) -> float:
        """-> seconds for which this rank stood still."""
        began_s = time.perf_counter()
        self.saver.start(folder)
        return time.perf_counter() - began_s

    def check_save(self) -> None:
        self.saver.is_writing()

    def finish_save(self) -> None:
        self.saver.wait()

    def save_with_megatron(self, folder: Path) -> float:
        """Megatron's own synchronous save of the same state -> seconds."""
        from megatron.core import dist_checkpointing, parallel_state

        began_s = time.perf_counter()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"dp_cp_group": group, "distrib_optim_sharding_type": "fully_reshardable"}
        weights = self.model.chunks[0].sharded_state_dict(metadata=metadata)
        optimizer = self.model.optimizer.sharded_state_dict(weights, metadata=metadata)
        dist_checkpointing.save({"model": weights, "optimizer": optimizer}, str(folder))
        return time.perf_counter() - began_s

    def load(self, folder: Path) -> float:
        from megatron_agent.training.checkpoint import load_megatron

        began_s = time.perf_counter()
        load_megatron(self.model, folder)
        return time.perf_counter() - began_s

    def digest(self) -> int:
        """Of all parameters and moments of this rank."""
        from megatron_agent.training.optimizer_state import distributed_optimizers

        states = [state for optimizer in distributed_optimizers(self.model) for state in optimizer.optimizer.state.values()]
        tensors = [*self.model.module.parameters(), *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]
        crc32 = 0
        for tensor in tensors:
            crc32 = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(), crc32)
        return crc32


def serve(pipes: list[Connection], store: str, rank: int, layout: Layout, path: Path, num_rows: int, num_tokens: int) -> None:
    """Body of a rank's process: does what comes through the first pipe until that is closed. `pipes`: all that it got."""
    pipe, *drivers = pipes
    for other in drivers:  # else nobody sees the end of the driver
        other.close()
    import torch.distributed as dist

    from megatron_agent.training import cpu

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=layout.world_size, timeout=timedelta(minutes=2)
    )
    mine = Rank(path, layout, num_rows, num_tokens)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return  # nobody is left
        try:
            answer = True, getattr(mine, method)(*arguments)
        except CheckpointError as error:
            answer = False, str(error)
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


class Ranks:
    """The ranks as Checkpoints wants an Actor. `context`: of multiprocessing."""

    def __init__(self, context, store: Path, layout: Layout, path: Path, num_rows: int = 4, num_tokens: int = 64) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        self.stalls_s: list[float] = []
        for rank in range(layout.world_size):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            inherited = self.pipes if context.get_start_method() == "fork" else []
            arguments = ([theirs, *inherited], str(store), rank, layout, path, num_rows, num_tokens)
            process = context.Process(target=serve, args=arguments)
            process.start()
            theirs.close()
            self.processes.append(process)

    async def all(self, method: str, *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((method, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            try:
                ok, result = await asyncio.to_thread(pipe.recv)
            except EOFError:
                raise TrainingError(f"rank {rank} died") from None
            if not ok:
                raise CheckpointError(result)
            results.append(result)
        return results

    async def save(self, folder: Path) -> None:
        self.stalls_s.append(max(await self.all("save", folder)))

    async def check_save(self) -> None:
        await self.all("check_save")

    async def finish_save(self) -> None:
        await self.all("finish_save")

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()
