"""Kills a training run with SIGKILL again and again while it saves, and looks whether every resume is right.

    python tools/kill_checkpoints.py [--kills 50] [--layout tp2|pp2|dp2] [--seed 0] [--folder DIR]

Real gloo ranks train a tiny Qwen2.5-VL and save after every step, asynchronously and synchronously by turns, keeping one
or two checkpoints. At a random moment all processes are killed, or the driver alone, or a rank alone; some kills are aimed
(POINTS). The next processes load the newest complete checkpoint, which must pass its checksums and hold bit for bit the
weights and moments that the step of its name had; then they train on, and every step must give the bits that it gave
before. Exits non-zero otherwise. --folder: on the file system to be tried. A kill is not a power failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # children are forked: no threads before

from _checkpoint_ranks import LAYOUTS, Ranks, run_config, write_model

from megatron_agent.checkpoints import Checkpoints
from megatron_agent.errors import CheckpointError, TrainingError
from megatron_agent.training.checkpoint import complete_checkpoints, read_state
from megatron_agent.training.layout import Layout

POINTS = ("parts written", "before the rename", "after the rename", "old one renamed", "old one half deleted")
LONGEST_S = 1.5  # from the first step on


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def aim_at(point: str) -> None:
    """Kill this process, the driver, when it comes there for the second time."""
    from megatron_agent.training import snapshot

    replace, rmtree, assemble = os.replace, shutil.rmtree, snapshot.assemble
    counts = dict.fromkeys(POINTS, 0)

    def at(here: str) -> None:
        counts[here] += 1
        if here == point and counts[here] == 2:
            die()

    def aimed_assemble(folder: Path, num_ranks: int):
        at("parts written")
        return assemble(folder, num_ranks)

    def aimed_replace(source, target) -> None:
        is_final = Path(target).name.startswith("step_")
        if is_final:
            at("before the rename")
        replace(source, target)
        if is_final:
            at("after the rename")
        elif Path(target).name.endswith(".old"):
            at("old one renamed")

    def aimed_rmtree(path, ignore_errors: bool = False) -> None:
        if Path(path).name.endswith(".old") and Path(path).is_dir():
            for file in sorted(p for p in Path(path).iterdir() if p.is_file())[:2]:
                file.unlink()
            at("old one half deleted")
        rmtree(path, ignore_errors=ignore_errors)

    snapshot.assemble, os.replace, shutil.rmtree = aimed_assemble, aimed_replace, aimed_rmtree  # type: ignore[assignment]


class Wrong(Exception):
    """What this tool looks for."""


def drive(pipe: Connection, folder: Path, layout: Layout, number: int, point: str) -> None:
    """Body of the driver's process: resume, compare, then train and save until it is killed."""
    os.setpgid(0, 0)
    config = run_config(folder / "hf", folder / "run", layout, asynchronous=number % 3 != 0, keep=1 + number % 2)
    ranks = Ranks(multiprocessing.get_context("fork"), folder / f"store{number}", layout, folder / "hf", 2, 16)
    if point:
        aim_at(point)
    pipe.send(("pids", [process.pid for process in ranks.processes]))
    try:
        asyncio.run(train(pipe, Checkpoints(config), ranks, folder / "digests.jsonl"))
    except (CheckpointError, Wrong) as error:
        pipe.send(("wrong", f"{type(error).__name__}: {error}"))
    except (TrainingError, OSError):
        pass  # a rank was killed
    os._exit(1)


async def train(pipe: Connection, checkpoints: Checkpoints, ranks: Ranks, digest_file: Path) -> None:
    digests: dict[int, list[int]] = {}
    for line in digest_file.read_text().splitlines() if digest_file.exists() else []:
        if line.endswith("]"):  # else: killed while it was written
            step, *sums = json.loads(line)
            digests[step] = sums

    async def compare(step: int, what: str) -> None:
        sums = await ranks.all("digest")
        if digests.setdefault(step, sums) != sums:
            raise Wrong(f"{what} step {step}: digests {sums}, they were {digests[step]}")
        with open(digest_file, "a") as file:
            file.write("\n" + json.dumps([step, *sums]))

    complete = complete_checkpoints(checkpoints.root)
    step = 0
    if complete:
        step = read_state(complete[-1])["step"]
        if step not in digests:
            raise Wrong(f"{complete[-1]} is of a step that never was")
        await ranks.all("load", complete[-1])
        await compare(step, "loaded")
    pipe.send(("ready", step))
    while True:
        await ranks.all("step")
        step += 1
        await compare(step, "trained")
        await checkpoints.check(ranks)
        await checkpoints.save(ranks, {"step": step})


def one_kill(folder: Path, layout: Layout, number: int, point: str, rng: random.Random) -> dict:
    """Start processes, kill them -> what was found; "wrong" in it is the verdict on the kill before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    driver = context.Process(target=drive, args=(theirs, folder, layout, number, point))
    driver.start()
    theirs.close()
    found: dict = {"whom": point or "?"}
    ranks: list[int] = []
    try:
        while "ready" not in found and "wrong" not in found:
            if not ours.poll(120):
                raise EOFError
            what, value = ours.recv()
            if what == "pids":
                ranks = value
            else:
                found[what] = value
        if "ready" in found:
            if point:
                driver.join(60)
                found["aimed"] = driver.exitcode == -signal.SIGKILL
            else:
                found["whom"] = whom = rng.choice(["all", "all", "driver", "rank"])
                if not ours.poll(rng.uniform(0, LONGEST_S)):
                    victims = {"all": [*ranks, driver.pid], "driver": [driver.pid], "rank": [rng.choice(ranks)]}[whom]
                    for pid in victims:
                        os.kill(pid, signal.SIGKILL)
                    driver.join(60)
            if ours.poll(0):
                what, value = ours.recv()
                found[what] = value
    except EOFError:
        pass  # the driver is dead; its last words were read
    finally:
        end_group(driver)
    root = folder / "run" / "checkpoints"
    found["partial"] = any(root.glob(".step_*.partial"))
    found["half_deleted"] = any(root.glob(".step_*.old"))
    found["newest"] = max((read_state(p)["step"] for p in complete_checkpoints(root)[-1:]), default=0)
    if "ready" not in found and "wrong" not in found:
        found["wrong"] = f"no resume: the driver ended with {driver.exitcode}"
    return found


def end_group(driver) -> None:
    """Ranks whose driver is gone end by themselves; what hangs in a collective does not."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(driver.pid, 0)
        except ProcessLookupError:
            break
        driver.join(0.05)
    else:
        os.killpg(driver.pid, signal.SIGKILL)
    driver.join()


def run(folder: Path, layout: Layout, kills: int, seed: int, quiet: bool = False) -> dict:
    """-> counts. Raises Wrong at the first resume that is not right."""
    write_model(folder / "hf", 64, 2)
    rng = random.Random(seed)
    counts = {"kills": 0, "in the middle of a save": 0, "of a deletion": 0, "resumes compared": 0, "newest step": 0}
    for number in range(kills + 1):  # the last one looks at the kill before it
        point = POINTS[number // 2 % len(POINTS)] if number % 2 and number < kills else ""
        began_s = time.perf_counter()
        found = one_kill(folder, layout, number, point, rng)
        found["seconds"] = round(time.perf_counter() - began_s, 1)
        if not quiet:
            print(number, found, flush=True)
        if "wrong" in found:
            raise Wrong(f"after kill {number} ({counts}): {found['wrong']}")
        if found["ready"] < counts["newest step"]:
            raise Wrong(f"step {counts['newest step']} was complete, the resume found {found['ready']}")
        if point and not found["aimed"]:
            raise Wrong(f"kill {number} missed {point!r}: {found}")
        counts["resumes compared"] += found["ready"] > 0
        counts["kills"] = min(number + 1, kills)
        counts["in the middle of a save"] += found["partial"]
        counts["of a deletion"] += found["half_deleted"]
        counts["newest step"] = max(counts["newest step"], found["newest"])
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--layout", choices=[name for name in LAYOUTS if name != "tp2pp2"], default="tp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quiet", action="store_true", help="the counts only")
    options = parser.parse_args()
    import torch

    from megatron_agent.training import cpu

    torch.set_num_threads(1)
    cpu.install()
    import megatron_agent.training.checkpoint
    import megatron_agent.training.megatron
    import megatron_agent.training.snapshot  # noqa: F401 (imported before the forks, once for all)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        try:
            print(json.dumps(run(Path(name), LAYOUTS[options.layout], options.kills, options.seed, options.quiet)))
        except Wrong as error:
            print(f"WRONG: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
