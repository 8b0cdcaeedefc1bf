"""Random state of one rank: Python, numpy, torch, CUDA and Megatron's tracker, as plain values."""

from __future__ import annotations

import logging
import random
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron_agent.training.layout import Layout
    from megatron_agent.training.megatron import MegatronModel

log = logging.getLogger(__name__)
RNG_FILE = "rng.pt"


def random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "tracker": {name: value.clone() for name, value in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Another sequence for every (seed, step); Python's and numpy's differ by rank, Megatron's as it wants them to."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    common = zlib.crc32(f"{seed} {step}".encode())
    torch.manual_seed(common)
    model_parallel_cuda_manual_seed(common)
    random.seed(f"{seed} {step} {rank}")
    np.random.seed(zlib.crc32(f"{seed} {step} {rank}".encode()))


def save_random_states(folder: Path, layout: Layout, states: list[dict[str, Any]]) -> None:
    """Of all ranks, in their order."""
    torch.save({"layout": asdict(layout), "has_cuda": "cuda" in states[0], "states": states}, folder / RNG_FILE)


def load_random_state(model: MegatronModel, folder: Path, step: int) -> None:
    """This rank's state as it was; anew from (seed, step, rank) when the checkpoint is of other ranks or hardware."""
    saved = torch.load(folder / RNG_FILE, weights_only=True)
    if saved["layout"] == asdict(model.layout) and saved["has_cuda"] == torch.cuda.is_available():
        set_random_state(saved["states"][model.rank])
        return
    if model.rank == 0:
        log.warning("%s: the random state is of another layout or hardware; seeded anew from (seed, step, rank)", folder)
    seed_anew(model.seed, step, model.rank)
