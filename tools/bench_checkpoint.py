"""How long training stands still for a checkpoint: asynchronous, synchronous, and Megatron's own synchronous save.

    python tools/bench_checkpoint.py [--layout tp2|pp2|dp2|tp2pp2] [--hidden-size 512] [--layers 6] [--rounds 5] [--folder DIR]

A random Qwen2.5-VL on real gloo ranks, which train on made-up rows; the driver completes the checkpoints as in a run. Each
round saves once in every way, so all meet the same disk and the same neighbours; the median of the rounds counts.
`stands still`: from the end of a step until the next one may begin. `slower steps`: what the steps take longer while the
files are written, all of them together (the writing needs a share of the cores that a GPU run would have to spare).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _checkpoint_ranks import LAYOUTS, Ranks, run_config, write_model

from megatron_agent.checkpoints import Checkpoints
from megatron_agent.training.checkpoint import complete_checkpoints

STEPS_BETWEEN = 3


async def measure(ranks: Ranks, checkpoints: dict[bool, Checkpoints], folder: Path, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    number = 0

    async def step_s() -> float:
        return max(await ranks.all("step"))

    for _ in range(2):
        await step_s()
    for _ in range(rounds + 1):  # the first one allocates memory
        plain = [await step_s() for _ in range(STEPS_BETWEEN)]
        found["step"].append(statistics.median(plain))
        for asynchronous, saver in checkpoints.items():
            number += 1
            began_s = time.perf_counter()
            await saver.save(ranks, {"step": number})
            found[f"stall {asynchronous}"].append(time.perf_counter() - began_s)
            found[f"copy {asynchronous}"].append(ranks.stalls_s[-1])
            extra = 0.0
            while saver._pending is not None:
                extra += await step_s() - found["step"][-1]
                await saver.check(ranks)
            found[f"extra {asynchronous}"].append(max(0.0, extra))
            found[f"all {asynchronous}"].append(time.perf_counter() - began_s)
        number += 1
        (folder / f"megatron{number}").mkdir()
        found["megatron"].append(max(await ranks.all("save_with_megatron", folder / f"megatron{number}")))
        last = complete_checkpoints(checkpoints[True].root)[-1]
        found["load"].append(max(await ranks.all("load", last)))
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    options = parser.parse_args()
    layout = LAYOUTS[options.layout]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        num_parameters = write_model(folder / "hf", options.hidden_size, options.layers)
        checkpoints = {
            asynchronous: Checkpoints(
                run_config(folder / "hf", folder / f"run_{asynchronous}", layout, asynchronous=asynchronous)
            )
            for asynchronous in (True, False)
        }
        ranks = Ranks(multiprocessing.get_context("spawn"), folder / "store", layout, folder / "hf")
        try:
            found = asyncio.run(measure(ranks, checkpoints, folder, options.rounds))
        finally:
            ranks.stop()
        size = sum(f.stat().st_size for f in complete_checkpoints(checkpoints[True].root)[-1].rglob("*") if f.is_file())
    median = {name: statistics.median(values) for name, values in found.items()}
    reference = median["stall False"]
    print(
        f"{num_parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB of state, {options.layout}, step {median['step']:.3f} s"
    )
    print(f"{'':28}{'stands still':>14}{'of sync':>9}{'slower steps':>14}{'until complete':>16}")
    for label, key in (("asynchronous", True), ("synchronous", False)):
        stall, extra, whole = (median[f"{what} {key}"] for what in ("stall", "extra", "all"))
        print(f"{label:28}{stall:12.3f} s{stall / reference:8.0%} {extra:11.3f} s{whole:14.3f} s")
    print(f"{'  of it the copies':28}{median['copy True']:12.3f} s{median['copy True'] / reference:8.0%}")
    print(f"{'Megatron, no checksums':28}{median['megatron']:12.3f} s{median['megatron'] / reference:8.0%}")
    print(f"load with checksums {median['load']:.3f} s")


if __name__ == "__main__":
    main()
