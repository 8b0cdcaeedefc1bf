"""Speed of a training step: ours against transformers, packed against padded rows, pipelines against their ideal.

    python tools/bench_train.py [--json FILE] [--steps 5] [--threads 2] [--quick]

Everything runs on CPU in fp32, with random weights that transformers made, and is compared within the run:

step      MegatronModel.update (one rank) against transformers with sdpa attention and torch's fused AdamW, same rows, same
          threads, by turns in two processes. transformers gets its pixels ready-made, the vocabulary's logits where tokens
          count only, and the faster of two ways: row by row, or one padded batch. The losses of all steps must agree.
packed    the same Megatron model on rows of a long-tailed spread of lengths, packed to a token budget, against the same rows
          each padded to the longest, as many tokens a micro-batch. Useful tokens (those of the rows) per second.
pipeline  PP 2, and PP 2 x VPP 2, one thread a rank: the schedule's measured time against (m + (p - 1) / v) / m times the
          busiest stage's computing (m micro-batches, p stages, v chunks a stage). The rest is waiting and exchange.
vision    patches of the busiest rank over the mean rank's when pictures are shared out whole; TP 2 is measured in a run.

Exit status: 0, 1 when losses disagree, 2 where a process failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _bench_ranks import (
    ModelSize,
    RowShape,
    Step,
    Stepper,
    make_rows,
    megatron_steps,
    packed_and_padded_steps,
    timed_steps,
    transformers_steps,
    write_model,
)
from _parity_ranks import RankError, Ranks, family_of, in_process

from megatron_agent.balance import split_balanced
from megatron_agent.training.layout import Layout
from megatron_agent.types import TrainSample

LOSS_LIMIT = 1e-4  # |difference| of the losses of every step
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Sizes:
    """What is measured. `spread`: rows of the packed and pipeline parts."""

    model: ModelSize
    small_model: ModelSize
    rows: tuple[RowShape, ...]
    spread: tuple[RowShape, ...]
    budget_tokens: int
    num_microbatches: int


def long_tailed(count: int, median_tokens: int, pictures: tuple[tuple[int, int], ...]) -> tuple[RowShape, ...]:
    """Lognormal text lengths (sigma 0.75, by quantile: no luck in it), every third row with a picture."""
    normal = statistics.NormalDist(0.0, 0.75)
    shapes = []
    for i in range(count):
        tokens = round(median_tokens * 2.718281828 ** normal.inv_cdf((i + 0.5) / count))
        shapes.append(RowShape(tokens, max(2, tokens // 3), (pictures[i % len(pictures)],) if i % 3 == 0 else ()))
    return tuple(shapes[i * 7 % count] for i in range(count))  # 7: no divisor of count, so that long rows are spread out


FULL = Sizes(
    ModelSize(hidden=768, ffn=3072, layers=6, heads=12, vocab=32768, vision_hidden=512, vision_ffn=1368, vision_depth=8),
    ModelSize(hidden=384, ffn=1024, layers=8, heads=6, vocab=8192, vision_hidden=128, vision_ffn=384, vision_depth=2),
    (
        RowShape(400, 150, ((672, 896),)),
        RowShape(260, 120, ((448, 672),)),
        RowShape(200, 80, ((448, 448),)),
    ),
    long_tailed(32, 110, ((112, 168), (168, 224), (112, 112))),
    2400,
    8,
)
QUICK = Sizes(
    ModelSize(hidden=128, ffn=256, layers=4, heads=2, vocab=512, vision_hidden=128, vision_ffn=200, vision_depth=2),
    ModelSize(hidden=128, ffn=256, layers=4, heads=2, vocab=512, vision_hidden=128, vision_ffn=200, vision_depth=2),
    (RowShape(30, 12, ((112, 168),)), RowShape(20, 8, ((56, 56),))),
    long_tailed(8, 16, ((56, 56),)),
    200,
    4,
)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def time_steps(path: Path, samples: list[TrainSample], options: argparse.Namespace, budget: int, work: Path) -> dict:
    """Ours and transformers by turns; the first step of each warms up."""
    theirs = Stepper(transformers_steps, path, samples, options.threads)
    ours = Stepper(megatron_steps, path, samples, options.threads, budget, work / "store step")
    try:
        steps: list[dict[str, Step]] = [{"ours": next(ours), **next(theirs)} for _ in range(options.steps + 1)]
    finally:
        ours.stop()
        theirs.stop()
    seconds = {name: [step[name].seconds for step in steps[1:]] for name in steps[0]}
    losses = {name: [step[name].loss for step in steps] for name in steps[0]}
    faster = min(seconds.keys() - {"ours"}, key=lambda way: median(seconds[way]))
    return {
        "tokens": sum(s.num_tokens for s in samples),
        "pictures_px": [[ref.width_px, ref.height_px] for s in samples for ref in s.images],
        "seconds": seconds,
        "faster": faster,
        "ratio": median(seconds[faster]) / median(seconds["ours"]),
        "losses": losses,
        "loss_difference": max(abs(a - b) for way in losses for a, b in zip(losses[way], losses["ours"])),
    }


def time_packing(path: Path, samples: list[TrainSample], options: argparse.Namespace, budget: int, work: Path) -> dict:
    stepper = Stepper(packed_and_padded_steps, path, samples, options.threads, budget, work / "store packing")
    try:
        steps = [next(stepper) for _ in range(options.steps + 1)]
    finally:
        stepper.stop()
    lengths = [s.num_tokens for s in samples]
    packed, padded = ([step[i].seconds for step in steps][1:] for i in range(2))
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest_over_mean": max(lengths) * len(lengths) / sum(lengths),
        "microbatches_packed": steps[0][3],
        "microbatches_padded": steps[0][4],
        "packed_s": packed,
        "padded_s": padded,
        "ratio": median(padded) / median(packed),
        "loss": steps[0][0].loss,
        "loss_difference": abs(steps[0][2] - steps[0][0].loss),
    }


def time_layouts(path: Path, samples: list[TrainSample], options: argparse.Namespace, num_microbatches: int) -> list[dict]:
    """Pipelines, and TP 2 for its vision."""
    family = family_of(path)
    found = []
    ranks = Ranks(2)
    try:
        for name, layout in {
            "PP 2": Layout(pipeline_parallel=2),
            "PP 2 VPP 2": Layout(pipeline_parallel=2, virtual_pipeline=2),
            "TP 2": Layout(tensor_parallel=2),
        }.items():
            layout = family.balanced(layout)
            times = ranks.run(2, timed_steps, path, layout, samples, num_microbatches, options.steps)
            m, p, v = times[0].num_microbatches, layout.pipeline_parallel, layout.virtual_pipeline
            busy = [median(rank.busy_s) for rank in times]
            ideal = (m + (p - 1) / v) / m * max(busy)
            schedule = max(median(rank.schedule_s) for rank in times)
            found.append({
                "layout": name, "microbatches": m, "stage_layers": list(layout.stage_layers), "busy_s": busy,
                "balance": max(busy) * len(busy) / sum(busy), "ideal_s": ideal, "schedule_s": schedule,
                "over_ideal": schedule / ideal, "idle_ideal": 1 - max(busy) / ideal, "idle": 1 - max(busy) / schedule,
                "step_s": max(median(rank.step_s) for rank in times), "loss": sum(rank.loss for rank in times),
                "vision_imbalance": max(rank.vision_imbalance for rank in times),
            })  # fmt: skip
    finally:
        ranks.stop()
    return found


def vision_balance(path: Path, samples: list[TrainSample]) -> dict[str, float]:
    """Number of ranks -> patches of the busiest over the mean rank's, all rows' pictures in one batch."""
    family = family_of(path)
    counts = [rows * columns for s in samples for _, rows, columns in (family.grid(ref) for ref in s.images)]
    found = {}
    for size in (2, 4, 8):
        if len(counts) >= size:
            loads = [sum(counts[i] for i in part) for part in split_balanced(counts, size)]
            found[str(size)] = max(loads) * size / sum(loads)
    return found


def measure(options: argparse.Namespace) -> dict:
    sizes = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        say("models ...")
        num_parameters = in_process(write_model, work / "model", sizes.model)
        in_process(write_model, work / "small", sizes.small_model)
        rows, spread = make_rows(work / "model", sizes.rows), make_rows(work / "small", sizes.spread)
        found: dict = {"parameters": num_parameters, "threads": options.threads, "steps": options.steps}
        parts: dict[str, Callable[[], object]] = {
            "step": lambda: time_steps(work / "model", rows, options, sizes.budget_tokens, work),
            "packing": lambda: time_packing(work / "small", spread, options, sizes.budget_tokens, work),
            "layouts": lambda: time_layouts(work / "small", spread, options, sizes.num_microbatches),
            "vision_balance": lambda: vision_balance(work / "small", spread),
        }
        for name, part in parts.items():
            if name in options.parts:
                say(f"{name} ...")
                found[name] = part()
    return found


def table(found: dict) -> str:
    lines = [f"{found['threads']} threads, medians of {found['steps']} steps"]
    if step := found.get("step"):
        pictures = ", ".join(f"{w}x{h}" for w, h in step["pictures_px"])
        ways = sorted(step["seconds"].keys() - {"ours"}, key=lambda way: median(step["seconds"][way]))
        by_speed = {**{f"transformers, {way}": step["seconds"][way] for way in ways}, "ours": step["seconds"]["ours"]}
        lines += [
            "",
            f"training step: {found['parameters'] / 1e6:.0f} M parameters, {step['tokens']} tokens, pictures {pictures} px",
            f"{'':34}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}",
            *_speeds(by_speed, step),
            f"losses of all steps agree to {step['loss_difference']:.1e}",
        ]
    if packing := found.get("packing"):
        lines += [
            "",
            f"{packing['rows']} rows of {packing['tokens']} tokens, the longest {packing['longest_over_mean']:.1f} x the mean",
            f"{'':34}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}",
            *_speeds({"padded to the longest": packing["padded_s"], "packed": packing["packed_s"]}, packing),
        ]
    if layouts := found.get("layouts"):
        lines += [
            "",
            f"{'two ranks, one thread each':28}{'micro-':>8}{'layers of':>11}{'computing a':>15}{'stage':>9}{'schedule, s':>18}"
            f"{'idle, %':>18}{'vision':>9}",
            f"{'':28}{'batches':>8}{'chunks':>11}{'rank, s':>15}{'balance':>9}{'ideal':>9}{'measured':>9}{'ideal':>9}"
            f"{'measured':>9}{'balance':>9}",
        ]
        for row in layouts:
            busy = " ".join(f"{s:.2f}" for s in row["busy_s"])
            layers = " ".join(map(str, row["stage_layers"])) or "all"
            lines.append(
                f"{row['layout']:28}{row['microbatches']:8}{layers:>11}{busy:>15}{row['balance']:9.2f}{row['ideal_s']:9.2f}"
                f"{row['schedule_s']:9.2f}{100 * row['idle_ideal']:9.0f}{100 * row['idle']:9.0f}{row['vision_imbalance']:9.2f}"
            )
    if balance := found.get("vision_balance"):
        shares = ", ".join(f"{value:.2f} over {size} ranks" for size, value in balance.items())
        lines += ["", f"vision, all pictures of the batch at once: busiest / mean patches {shares}"]
    return "\n".join(lines)


def _speeds(seconds: dict[str, list[float]], part: dict) -> list[str]:
    """The first is what the others are compared with."""
    base = median(next(iter(seconds.values())))
    return [f"{n:34}{median(s):9.3f}{part['tokens'] / median(s):10.0f}{base / median(s):8.2f}" for n, s in seconds.items()]


def say(text: str) -> None:
    print(f"bench_train: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each process but the pipelines' (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run, not how fast")
    parts = ["step", "packing", "layouts", "vision_balance"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    options = parser.parse_args(arguments)
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(options.threads))
    try:
        found = measure(options)
    except RankError as error:
        say(str(error))
        return 2
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    status = 0
    for name in ("step", "packing"):
        difference = found[name]["loss_difference"] if name in found else 0.0
        if not difference <= LOSS_LIMIT:
            say(f"{name}: the losses differ by {difference:.1e}, more than {LOSS_LIMIT:.0e}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
