"""Speed and memory of tools/convert.py against `cp` of the same files, side by side, on a synthetic Qwen2.5-VL.

    python tools/bench_convert.py [--size-gb 2] [--tp 2] [--pp 2] [--rounds 5] [--folder DIR]

Random bytes in the shapes of the 3B model (fewer layers), bfloat16, several shard files. Each round runs cp, both
conversions and the whole command one after another, so they meet the same disk and the same neighbours; the median of the
rounds counts. Conversions end with fsync, so `cp` is timed with and without it. Not measured: a cold page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from convert import hf_to_megatron, megatron_to_hf
from safetensors.torch import save_file

from megatron_agent.training.dist_checkpoint import checkpoint_table, shapes_of
from megatron_agent.training.hf_export import INDEX_FILE, read_family, sync
from megatron_agent.training.layout import Layout

SHARD_BYTES = 500_000_000


def config_of(num_layers: int) -> dict:
    return dict(
        model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"], torch_dtype="bfloat16",
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=num_layers, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=128000,
        tie_word_embeddings=True, image_token_id=151655, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        vision_config=dict(
            depth=4, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, patch_size=14,
            temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=[3], in_chans=3,
        ),
    )  # fmt: skip


def write_model(folder: Path, size_bytes: int) -> int:
    """A checkpoint of at least about `size_bytes` -> its true size."""
    folder.mkdir()

    def shapes_with(num_layers: int) -> dict[str, tuple[int, ...]]:
        (folder / "config.json").write_text(json.dumps(config_of(num_layers)))
        return shapes_of(checkpoint_table(read_family(folder)))

    def num_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
        return 2 * sum(map(prod, shapes.values()))

    smallest = num_bytes(shapes_with(2))
    of_two_layers = num_bytes(shapes_with(4)) - smallest
    shapes = shapes_with(2 + 2 * max(0, round((size_bytes - smallest) / of_two_layers)))
    noise = torch.randint(-32768, 32767, (SHARD_BYTES // 2 + 7919,), dtype=torch.int16).view(torch.bfloat16)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in sorted(shapes.items()):
        if files[-1] and num_bytes(files[-1]) + 2 * prod(shape) > SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    index = {}
    for number, members in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for at, (name, shape) in enumerate(members.items()):
            source = noise if prod(shape) <= len(noise) - at else noise.repeat(-(-(prod(shape) + at) // len(noise)))
            tensors[name] = source[at : at + prod(shape)].clone().view(shape)
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(members, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": num_bytes(shapes)}, "weight_map": index}))
    return sum(f.stat().st_size for f in folder.iterdir())


def copy_files(source: Path, target: Path, synced: bool) -> None:
    target.mkdir()
    subprocess.run(["cp", *map(str, source.iterdir()), str(target)], check=True)
    if synced:
        sync(target.iterdir())


def peak_rss_bytes(command: list[str]) -> int:
    """Runs the command; what the kernel counts against it, mapped files included."""
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return peak


def measure(root: Path, options: argparse.Namespace) -> None:
    source, megatron = root / "hf", root / "megatron"
    size = write_model(source, int(options.size_gb * 1e9))
    num_files = len(list(source.glob("*.safetensors")))
    print(f"{size / 1e9:.2f} GB in {num_files} files, to TP {options.tp} PP {options.pp}, {options.workers} threads")
    layout = Layout(options.tp, options.pp)
    script = str(Path(__file__).with_name("convert.py"))
    flags = ["--workers", str(options.workers), "--quiet"]
    cuts = ["--tp", str(options.tp), "--pp", str(options.pp)]
    jobs: dict[str, Callable[[Path], object]] = {
        "cp": lambda out: copy_files(source, out, synced=False),
        "hf-to-megatron": lambda out: hf_to_megatron(source, out, layout, options.workers, quiet=True),
        "megatron-to-hf": lambda out: megatron_to_hf(megatron, out, None, options.workers, quiet=True),
        "cp, fsync": lambda out: copy_files(source, out, synced=True),
        "hf-to-megatron, the whole command": lambda out: subprocess.run(
            [sys.executable, script, "hf-to-megatron", "--in", str(source), "--out", str(out), *cuts, *flags], check=True
        ),
    }
    hf_to_megatron(source, megatron, layout, options.workers, quiet=True)
    seconds = defaultdict(list)
    for _ in range(options.rounds):
        for name, job in jobs.items():
            sync(p for p in root.rglob("*") if p.is_file())  # nobody pays for what the one before left to write
            start = time.perf_counter()
            job(root / "out")
            seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(root / "out")
    median = {name: statistics.median(of_job) for name, of_job in seconds.items()}
    print(f"{'':36}{'seconds (median; all)':>32}{'GB/s':>8}{'x cp':>8}{'x cp, fsync':>13}")
    for name, took in median.items():
        each = f"{took:.2f}  ({' '.join(f'{s:.2f}' for s in seconds[name])})"
        ratios = f"{median['cp'] / took:8.2f}{median['cp, fsync'] / took:13.2f}"
        print(f"{name:36}{each:>32}{size / took / 1e9:8.2f}{ratios}")
    largest = max(f.stat().st_size for f in source.iterdir())
    for command in (["hf-to-megatron", "--in", str(source), *cuts], ["megatron-to-hf", "--in", str(megatron)]):
        peak = peak_rss_bytes([sys.executable, script, *command, "--out", str(root / "out"), *flags])
        shutil.rmtree(root / "out")
        print(f"{command[0]}: peak RSS {peak / 2**30:.2f} GiB; allowed {largest / 2**30 + 1:.2f} (largest file + 1 GiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work: the disk to measure; about 4x the size is needed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as tools/convert.py does
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        measure(Path(root), options)


if __name__ == "__main__":
    main()
