"""What pictures cost a step: bytes through Ray and peak memory, by reference and copied into every trajectory.

    python tools/bench_images.py [--prompts 256] [--rollouts 16] [--opened 256] [--copied 8] [--json FILE]

Every prompt shows one picture of 3840 x 2160 px (JPEG); every rollout looks at three crops of it, one a turn. Two real Ray
actors stand for an engine and a trainer rank: the engine gets the token row and the pictures so far with every turn and opens
them as it does for vLLM, the trainer gets the finished samples and opens what they show.

- by reference: what this project sends (ImageRefs); the bytes lie in the node's image store, once, and a crop is a recipe.
- copied: the pictures themselves travel in every message, as shown (`pixels`, PIL pictures: what DeepEyes' agent sends with
  every turn and keeps in its batch) or as JPEG files (`files`). Measured on `--copied` trajectories and scaled to all.

Bytes are those of Ray's own serialisation, token rows included on all sides. Memory is the largest sum of the proportional set
sizes of this process and all its descendants (Ray's own included), with the pixels of `--opened` prompts opened; that of the
copied batch is its bytes, which a driver holds at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

import numpy as np
import psutil
from PIL import Image

from megatron_agent.data.images import PATCH_SIDE_PX, ImageStore, PixelLimits
from megatron_agent.types import ImageRef, TrainSample

PROMPT_LIMITS, CROP_LIMITS = PixelLimits(3136, 4014080), PixelLimits(3136, 1003520)  # examples/deepeyes
TURN_TOKENS, PROMPT_TOKENS = 200, 600  # of text
NUM_CROPS = 3
GIB = 2**30


class Opener:
    """An engine or a trainer rank as far as pictures go."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def open(self, row: list[int], images: list[ImageRef]) -> int:
        """What the engine hands to vLLM; -> pixels."""
        return sum(picture.width * picture.height for picture in map(self.store.picture, images))

    def train(self, samples: list[TrainSample]) -> int:
        """What a micro-batch takes of each picture; -> pixels."""
        return sum(self.store.pixels(ref).size // 3 for sample in samples for ref in sample.images)


def picture_file() -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (135, 240, 3), np.uint8)).resize((3840, 2160), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-6, 7, (2160, 3840, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def crops_of(store: ImageStore, ref: ImageRef, rollout: int) -> list[ImageRef]:
    rng = np.random.default_rng(rollout)
    corners = rng.integers(0, (ref.width_px - 900, ref.height_px - 700), (NUM_CROPS, 2)).tolist()
    return [store.crop(ref, (x, y, x + 880, y + 660), CROP_LIMITS) for x, y in corners]


def num_tokens(images: Sequence[ImageRef]) -> int:
    return sum(ref.width_px * ref.height_px // PATCH_SIDE_PX**2 for ref in images)


def row_of(images: Sequence[ImageRef], num_turns: int) -> list[int]:
    return list(range(1000, 1000 + PROMPT_TOKENS + num_tokens(images) + TURN_TOKENS * num_turns))


def turns_of(images: list[ImageRef]) -> list[tuple[list[int], list[ImageRef]]]:
    """What the engine is sent: before each turn, the row and the pictures so far."""
    return [(row_of(images[: 1 + turn], turn), images[: 1 + turn]) for turn in range(NUM_CROPS + 1)]


def sample_of(images: list[ImageRef]) -> TrainSample:
    row = row_of(images, NUM_CROPS + 1)
    return TrainSample(row, [False] * len(row), [0.123] * len(row), [0.456] * len(row), images)


def ray_bytes(value: object) -> int:
    import ray

    return ray._private.worker.global_worker.get_serialization_context().serialize(value).total_bytes


class PeakMemory(threading.Thread):
    """The largest sum of proportional set sizes of this process and its descendants, looked at twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0

    def run(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has ended meanwhile
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(0.5)


def by_reference(options: argparse.Namespace, store: ImageStore, refs: list[ImageRef]) -> dict[str, float]:
    import ray

    remote = ray.remote(num_cpus=0)(Opener)
    engine, trainer = remote.remote(store), remote.remote(store)
    sent_bytes, under_way = 0, []
    for number, ref in enumerate(refs):
        samples = []
        for rollout in range(options.rollouts):
            images = [ref, *crops_of(store, ref, number * options.rollouts + rollout)]
            for message in turns_of(images):
                sent_bytes += ray_bytes(message)
                if number < options.opened:
                    under_way.append(engine.open.remote(*message))
            samples.append(sample_of(images))
        in_store = ray.put(samples)
        sent_bytes += ray_bytes(samples)
        under_way.append(trainer.train.remote(in_store if number < options.opened else []))
        if number % 4 == 3:
            ray.get(under_way)
            under_way = []
    ray.get(under_way)
    return {"sent_bytes": sent_bytes}


def copied(options: argparse.Namespace, store: ImageStore, ref: ImageRef) -> dict[str, float]:
    """Bytes of a trajectory whose pictures travel with it, scaled to all."""
    totals = dict.fromkeys(("pixels_sent", "pixels_kept", "files_sent"), 0)
    for rollout in range(options.copied):
        images = [ref, *crops_of(store, ref, rollout)]
        pictures = {image: store.picture(image) for image in images}
        files = {image: jpeg_of(store, image, picture) for image, picture in pictures.items()}
        for row, shown in turns_of(images):
            totals["pixels_sent"] += ray_bytes((row, [pictures[image] for image in shown]))
            totals["files_sent"] += ray_bytes((row, [files[image] for image in shown]))
        sample = sample_of([])
        totals["pixels_kept"] += ray_bytes((sample, list(pictures.values())))
        totals["files_sent"] += ray_bytes((sample, list(files.values())))
    totals["pixels_sent"] += totals["pixels_kept"]  # the finished samples go to the trainer
    return {name: total / options.copied * options.prompts * options.rollouts for name, total in totals.items()}


def jpeg_of(store: ImageStore, ref: ImageRef, picture: Image.Image) -> bytes:
    if ref.crop_box_px is None:
        return store.bytes_of(ref.source)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--opened", type=int, help="prompts whose pixels are opened on both sides; default: all")
    parser.add_argument("--copied", type=int, default=8, help="trajectories on which copying is measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.opened = options.prompts if options.opened is None else options.opened
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20)
    memory = PeakMemory()
    memory.start()
    with tempfile.TemporaryDirectory() as folder:
        store = ImageStore(folder, PROMPT_LIMITS)
        file = picture_file()
        refs = [store.put(file + number.to_bytes(4, "big")) for number in range(options.prompts)]
        began_s = time.perf_counter()
        found = by_reference(options, store, refs)
        found |= {"seconds": time.perf_counter() - began_s, "peak_bytes": memory.peak_bytes}
        stored = [path.stat().st_size for path in Path(folder).rglob("?" * 64)]
        found |= {"stored_files": len(stored), "stored_bytes": sum(stored), "opened_prompts": options.opened}
        found |= copied(options, store, refs[0])
    ray.shutdown()
    print(
        f"{options.prompts} x {options.rollouts} rollouts, {NUM_CROPS} crops each; pixels of {options.opened} opened in "
        f"{found['seconds']:.0f} s; {found['stored_files']} picture files on the node ({found['stored_bytes'] / GIB:.2f} GiB)\n"
        f"through Ray: {found['sent_bytes'] / GIB:.2f} GiB by reference; copied, scaled from {options.copied} trajectories: "
        f"{found['files_sent'] / GIB:.0f} GiB as files ({found['files_sent'] / found['sent_bytes']:.0f}x), "
        f"{found['pixels_sent'] / GIB:.0f} GiB as pixels ({found['pixels_sent'] / found['sent_bytes']:.0f}x)\n"
        f"peak memory: {found['peak_bytes'] / GIB:.2f} GiB by reference; a copied batch alone: "
        f"{found['pixels_kept'] / GIB:.0f} GiB of pixels ({found['pixels_kept'] / found['peak_bytes']:.0f}x)"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if found["files_sent"] >= 10 * found["sent_bytes"] and found["peak_bytes"] < 4 * GIB else 1


if __name__ == "__main__":
    sys.exit(main())
