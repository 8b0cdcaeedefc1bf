"""What reading a dataset at the start of a run costs: seconds, rows a second and memory, first and second start.

    python tools/bench_data.py [--rows 8000] [--workers 1,2] [--hf DIR] [--folder DIR]

Writes a parquet file as DeepEyes-47k is published, all rows in one row group and pages of Arrow's usual 1,024 rows (the
largest of its files, 2.2 GB, has 161 kB a row: so has this one), each row with a JPEG of 1280 x 960 px and other bytes than
the others'. Every start is a process of its own; its memory is the largest resident set less the one before reading.
`--hf` counts prompt tokens with that folder's tokenizer too. The file and the image store need about 2 x 161 kB a row.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROW_BYTES = 161_000
SYSTEM = "You are a helpful assistant. You may call the function image_zoom_in_tool to look closer at a region. " * 20


def jpeg() -> bytes:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((1280, 960), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (960, 1280, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=60)
    return file.getvalue()


def write(path: Path, num_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = jpeg()
    rows = [
        {
            "data_source": "bench",
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"<image>\nQuestion {i}?"}],
            "images": [{"bytes": picture.ljust(ROW_BYTES, b"\0") + i.to_bytes(4, "big"), "path": None}],
            "env_name": "visual_toolbox_v2",
            "reward_model": {"ground_truth": f"answer {i}", "style": "model"},
            "extra_info": {"answer": f"answer {i}", "index": i, "question": f"Question {i}?", "split": "train"},
        }
        for i in range(num_rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=num_rows)


def memory_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def start(path: Path, store_folder: Path, num_workers: int, hf: str) -> dict[str, float]:
    """What a run does with its files before anything else, in this process."""
    import pyarrow.parquet  # noqa: F401 - not counted as memory of reading

    from megatron_agent import registry
    from megatron_agent.data.dataset import DataConfig, drop_long_prompts, read_tasks
    from megatron_agent.data.images import ImageStore

    config = DataConfig(num_workers=num_workers)
    registry.resolve("envs", "visual_toolbox_v2")
    renderer = registry.resolve("models", "qwen2_5_vl")(hf).renderer(hf) if hf else None
    before_bytes, began_s, cpu_s = memory_bytes("VmRSS"), time.perf_counter(), time.process_time()
    tasks, _ = read_tasks([path], config, ImageStore(store_folder, config.pixel_limits()))
    found = {"read_s": time.perf_counter() - began_s, "cpu_s": time.process_time() - cpu_s, "rows": len(tasks)}
    found["peak_bytes"], found["kept_bytes"] = memory_bytes("VmHWM") - before_bytes, memory_bytes("VmRSS") - before_bytes
    found["task_bytes"] = len(pickle.dumps(tasks)) / len(tasks)
    if renderer is not None:
        began_s = time.perf_counter()
        drop_long_prompts(tasks, lambda task: len(renderer.prompt(task.messages, task.images)), 8192, num_workers)
        found["tokens_s"] = time.perf_counter() - began_s
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--workers", default="1,2", help="numbers of threads, each with a first and a second start")
    parser.add_argument("--hf", default="", help="folder of a Qwen2.5-VL checkpoint")
    parser.add_argument("--folder", help="for the file and the image store; default: a temporary one")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # file, store, threads: a start in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(start(Path(options.one[0]), Path(options.one[1]), int(options.one[2]), options.hf)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, store = Path(folder) / "bench.parquet", Path(folder) / "store"
        write(path, options.rows)
        print(f"{options.rows} rows, {path.stat().st_size / 1e9:.2f} GB, one row group")
        for num_workers in map(int, options.workers.split(",")):
            shutil.rmtree(store, ignore_errors=True)
            for which in ("first", "second"):
                command = [sys.executable, __file__, "--one", str(path), str(store), str(num_workers), "--hf", options.hf]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                mib = {name: found[f"{name}_bytes"] / 2**20 for name in ("peak", "kept")}
                print(
                    f"{num_workers} threads, {which:6} start: {found['read_s']:6.1f} s (CPU {found['cpu_s']:.1f} s), "
                    f"{found['rows'] / found['read_s']:6.0f} rows/s, peak {mib['peak']:4.0f} MiB, afterwards "
                    f"{mib['kept']:3.0f} MiB, {found['task_bytes']:.0f} bytes a task"
                    + (f", tokens {found['tokens_s']:.1f} s" if options.hf else "")
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
