"""Seconds of a weight sync from Megatron ranks into vLLM: ours, the peers' route, and one memcpy of the same bytes.

    python tools/bench_weight_sync.py [--train tp=1,tp=2] [--dtype float32,bfloat16] [--rounds 5] [--json FILE] [--quick]

A Qwen2.5-VL with random weights (0.53 B parameters, the text of Qwen2.5-0.5B and a small tower), real Megatron ranks, a real
vLLM engine. The ways are taken by turns; medians of all rounds but the first:

ours        WeightSync.push: from the pause of generation to its end, vLLM's packing of the weights for its CPU kernels included
unverified  the same without checksums
peers       full tensors gathered over the tensor-parallel ranks and handed to vLLM's `load_weights` (layerwise reload) through
            memory that both processes see, one tensor being loaded while the next is gathered. Nothing verified, no bound
            on memory: room for the whole model
transport   ours into a process that only holds the parameters
memcpy      one thread, the bytes that the engine holds, memory touched before

Memory: by how much each process grew at most in a sync (the kernel's high-water mark; shared memory counts in both). The
answers of the engine after ours and after the peers' route must be equal. Exit status 1 where they are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from megatron_agent import cluster
from megatron_agent.config import RunConfig
from megatron_agent.data.images import ImageStore, PixelLimits
from megatron_agent.models.base import ModelFamily
from megatron_agent.rollout.engine import RolloutConfig
from megatron_agent.rollout.generation import Generation, Sampling
from megatron_agent.rollout.pool import EnginePool
from megatron_agent.sync import WeightSync, transfer_plan
from megatron_agent.training.actor import Actor, TrainingConfig
from megatron_agent.training.hf_export import read_family
from megatron_agent.training.layout import Layout, megatron_pieces
from megatron_agent.weights.meeting import SHARED_MEMORY
from tools._sync_ranks import COUNTER_BYTES, PlainEngine, Region, SyncEngine, SyncWorker

ROOT = Path(__file__).resolve().parents[1]
TEXT = dict(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, initializer_range=0.02,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
)  # fmt: skip
VISION = dict(depth=4, hidden_size=768, intermediate_size=2048, num_heads=12, out_hidden_size=896, fullatt_block_indexes=[3])
MAX_PIXELS = 28 * 28 * 64  # vLLM tries the largest picture when it starts
PROMPT, SAMPLING = list(range(20, 50)), Sampling(temperature=0.0, max_tokens=4)
MEMCPY_BYTES = 256 << 20  # at a time: far more than any cache holds
PARTS = ("receive_weights", "write", "written", "sums")  # the first holds the others
GB = 1e9


def write_model(folder: Path, quick: bool) -> None:
    """Random weights in fp32; the quickstart's tokenizer, and its sizes with `quick`."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    import tiny_model
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_model.write_model(folder, ["what color is it ?"], seed=0)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"max_pixels": MAX_PIXELS, "size": processor["size"] | {"longest_edge": MAX_PIXELS}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if quick:
        return
    config = Qwen2_5_VLForConditionalGeneration.config_class.from_pretrained(folder)
    for name, value in TEXT.items():
        setattr(config.text_config, name, value)
    for name, value in VISION.items():
        setattr(config.vision_config, name, value)
    config.text_config.layer_types = ["full_attention"] * TEXT["num_hidden_layers"]
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(folder)


def region_of(family: ModelFamily, layout: Layout, dtype: str, file: Path) -> Region:
    """All Hugging Face tensors, in the order in which the ranks hold them."""
    table = family.table(layout, transformer_engine=False)
    shapes = {entry.hf_name: entry.shape for entry in table}
    tensors, end = [], COUNTER_BYTES
    for name in dict.fromkeys(p.hf_name for p in megatron_pieces(table, layout, family.num_layers, 0)):
        tensors.append((name, shapes[name], end))
        end += -(-prod(shapes[name]) * getattr(torch, dtype).itemsize // COUNTER_BYTES) * COUNTER_BYTES
    return Region(str(file), end, dtype, tuple(tensors))


class Bench:
    """One training layout and one dtype."""

    def __init__(self, config: RunConfig, family: ModelFamily, store: ImageStore, shared: Path) -> None:
        self.config, self.family, self.store, self.shared = config, family, store, shared
        (self.shapes,) = transfer_plan(config, family).template.shapes
        self.num_bytes = sum(map(prod, self.shapes.values())) * getattr(torch, config.training.dtype).itemsize
        self.version = 0

    async def start(self, engine: Any) -> None:
        import ray

        training, layout = self.config.training, self.config.training.layout
        remote = ray.remote(num_cpus=0)(SyncWorker)
        workers = [remote.remote(rank, layout, self.store, training.num_cpu_threads) for rank in range(layout.world_size)]
        self.actor, self.engine = Actor(workers, training), engine
        threads = self.config.rollout.num_cpu_threads
        self.plain = ray.remote(num_cpus=0)(PlainEngine).remote(self.shapes, training.dtype, threads)
        await self.actor.set_up(self.config.model.family, self.config.model.path, 0, self.config.vision)
        self.receivers = {"engine": engine, "plain": self.plain}
        self.syncs = {
            name: WeightSync(self.config, self.family, self.actor, EnginePool([handle]))
            for name, handle in self.receivers.items()
        }
        self.region = region_of(self.family, layout, training.dtype, self.shared / "region")
        self.region_memory = self.region.open()
        self.copied = torch.ones(2, MEMCPY_BYTES // 8, dtype=torch.int64)

    async def stop(self) -> None:
        import ray

        for handle in (*self.actor.workers, self.plain):
            ray.kill(handle)
        del self.region_memory, self.copied
        Path(self.region.file).unlink()

    async def ours(self, into: str, verify: bool = True) -> dict[str, Any]:
        """-> seconds from the driver, and what each process says of its part."""
        receiver = self.receivers[into]
        await asyncio.gather(*(h.start_probe.remote(verify) for h in (*self.actor.workers, receiver)))
        self.version += 1
        seconds = await timed(lambda: self.syncs[into].push(self.version))
        senders = await asyncio.gather(*(w.read_probe.remote() for w in self.actor.workers))
        read = await receiver.read_probe.remote()
        return {"seconds": seconds, "senders": senders, "receiver": read[0] if into == "engine" else read}

    async def peers(self) -> dict[str, Any]:
        handles = (*self.actor.workers, self.engine)
        await asyncio.gather(*(h.start_probe.remote() for h in handles))
        self.region_memory[:8].zero_()
        calls = [w.gather.remote for w in self.actor.workers] + [self.engine.sync_gathered.remote]
        seconds = await timed(lambda: asyncio.gather(*(call(self.region) for call in calls)))
        senders = await asyncio.gather(*(w.read_probe.remote() for w in self.actor.workers))
        return {"seconds": seconds, "senders": senders, "receiver": (await self.engine.read_probe.remote())[0]}

    def memcpy(self) -> dict[str, Any]:
        began_s = time.perf_counter()
        for _ in range(num_copies := max(1, round(self.num_bytes / MEMCPY_BYTES))):
            self.copied[1].copy_(self.copied[0])
        return {"seconds": (time.perf_counter() - began_s) * self.num_bytes / (num_copies * MEMCPY_BYTES)}

    async def answer(self) -> Generation:
        return await self.engine.generate.remote(PROMPT, [], SAMPLING)

    async def agree(self) -> bool:
        """Whether new weights arrive by both routes, and give the same answer."""
        answers = [await self.answer()]
        for route, scale in ((lambda: self.ours("engine"), 0.75), (self.peers, 1.0), (self.peers, 1.25)):
            await asyncio.gather(*(w.disturb.remote(scale) for w in self.actor.workers))
            await route()
            answers.append(await self.answer())
        said = [(a.token_ids, a.logprobs) for a in answers]
        return said[0] != said[1] and said[1] == said[2] and said[2] != said[3]

    async def measure(self, num_rounds: int) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", "unverified", "peers", "transport", "memcpy")}
        for _ in range(num_rounds + 1):
            found["peers"].append(await self.peers())
            await self.ours("engine")  # not counted: what a route leaves behind in the allocator is not the next one's
            found["ours"].append(await self.ours("engine"))
            found["unverified"].append(await self.ours("engine", verify=False))
            found["transport"].append(await self.ours("plain"))
            found["memcpy"].append(self.memcpy())
        return {name: rounds[1:] for name, rounds in found.items()}


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began_s = time.perf_counter()
    await work()
    return time.perf_counter() - began_s


def median(rounds: list[dict[str, Any]], *path: Any) -> float:
    values = []
    for value in rounds:
        for key in path:
            value = value.get(key, 0.0) if isinstance(value, dict) else value[key]
        values.append(value)
    return statistics.median(values)


def show(title: str, num_bytes: int, rounds: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {name: median(found, "seconds") for name, found in rounds.items()}
    print(f"\n{title}: {num_bytes / GB:.2f} GB")
    print(f"  {'':12}{'seconds':>9}{'GB/s':>8}{'x memcpy':>10}   all rounds")
    for name, found in rounds.items():
        took, each = seconds[name], " ".join(f"{r['seconds']:.2f}" for r in found)
        print(f"  {name:12}{took:9.3f}{num_bytes / took / GB:8.2f}{took / seconds['memcpy']:10.2f}   {each}")
    ours, part = seconds["ours"], {name: median(rounds["ours"], "receiver", name) for name in PARTS}
    waiting = 2 * part["receive_weights"] - sum(part.values())
    print(f"  peers / ours {seconds['peers'] / ours:.2f}; checksums cost {ours / seconds['unverified'] - 1:.1%}")
    print(
        f"  of ours, in the engine: pause, caches, resume {ours - part['receive_weights']:.3f}, waiting {waiting:.3f}, copying "
        f"{part['write']:.3f}, checksums {part['sums']:.3f}, packing {part['written']:.3f}; without packing "
        f"{(ours - part['written']) / seconds['memcpy']:.2f}x memcpy"
    )
    for name in ("ours", "peers", "transport"):
        peaks = [median(rounds[name], "senders", rank, "peak_bytes") for rank in range(len(rounds[name][0]["senders"]))]
        peaks.append(median(rounds[name], "receiver", "peak_bytes"))
        print(f"  {name}: processes grew by " + ", ".join(f"{p / 2**20:.0f}" for p in peaks) + " MiB (senders, then receiver)")


def config_of(folder: Path, tensor_parallel: int, dtype: str, threads: int) -> RunConfig:
    config = RunConfig()
    config.model.path, config.model.family = str(folder), "qwen2_5_vl"
    config.training = TrainingConfig(tensor_parallel=tensor_parallel, dtype=dtype, num_cpu_threads=threads)
    config.rollout = RolloutConfig(
        max_model_len=128, max_num_seqs=8, max_num_batched_tokens=128, dtype=dtype, num_cpu_threads=threads
    )
    config.agent.max_vllm_images = 1
    return config


async def run(options: argparse.Namespace, scratch: Path, shared: Path) -> tuple[list[dict[str, Any]], bool]:
    import ray

    folder = scratch / "model"
    write_model(folder, options.quick)
    family, store = read_family(folder), ImageStore(scratch / "pictures", PixelLimits(784, MAX_PIXELS))
    reports, all_agree = [], True
    for dtype in options.dtype.split(","):
        config = config_of(folder, 1, dtype, options.threads)
        arguments = (str(folder), config.rollout, store, 1, 0, "megatron_agent", "tools._sync_ranks.SyncExtension")
        engine = ray.remote(num_cpus=0, max_concurrency=64)(SyncEngine).remote(*arguments)
        for layout in options.train.split(","):
            bench = Bench(config_of(folder, int(layout.removeprefix("tp=")), dtype, options.threads), family, store, shared)
            await bench.start(engine)
            rounds = await bench.measure(options.rounds)
            agree = await bench.agree()
            await bench.stop()
            show(f"Megatron {layout} -> vLLM tp=1, {dtype}", bench.num_bytes, rounds)
            print(f"  answers after both routes {'equal' if agree else 'DIFFER, or the weights did not arrive'}", flush=True)
            all_agree &= agree
            reports.append({"train": layout, "dtype": dtype, "bytes": bench.num_bytes, "agree": agree, "rounds": rounds})
        ray.kill(engine)
    return reports, all_agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="tp=1,tp=2")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the quickstart's tiny model: says nothing about speed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # of Ray's and vLLM's processes
    scratch = Path(tempfile.mkdtemp(prefix="bench_weight_sync_"))
    shared = Path(tempfile.mkdtemp(prefix="bench_weight_sync_", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    cluster.start_ray()
    try:
        reports, all_agree = asyncio.run(run(options, scratch, shared))
    finally:
        cluster.stop_ray()
        for folder in (scratch, shared):
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1) + "\n")
    return int(not all_agree)


if __name__ == "__main__":
    sys.exit(main())
