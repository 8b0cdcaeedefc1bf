"""Reading Hugging Face shards into a rank's parameters; saving and loading training checkpoints.

A training checkpoint is a folder `step_00000010/` with Megatron's distributed checkpoint (weights, optimizer) and
`state.json` (step, data order, weight version). It is written under another name and renamed: what bears the final
name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_agent.errors import CheckpointError
from megatron_agent.models.mapping import Entry, Piece, Split, as_index

if TYPE_CHECKING:
    import torch

    from megatron_agent.training.megatron import MegatronModel

STATE_FILE = "state.json"


def weight_files(path: Path) -> dict[str, Path]:
    """HF tensor name -> the safetensors file that holds it. Raises CheckpointError for unreadable or missing files."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: damaged index: {error!r}") from error
        missing = sorted({str(f) for f in files.values() if not f.is_file()})
        if missing:
            raise CheckpointError(f"{path}: the index names files that are not there: {missing[:3]}")
        return files
    names: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with open_safetensors(file) as reader:
            names.update(dict.fromkeys(reader.keys(), file))
    return names


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """The reader of one safetensors file. Raises CheckpointError naming the file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file: {error}") from error


def load_hf_shards(module: torch.nn.Module, pieces: list[Piece], path: Path, table: list[Entry]) -> None:
    """Fill the module's parameters from an HF folder; only the bytes of this rank's boxes are read.

    `pieces` are this rank's of `table`. A rank that holds nothing but padding of the vocabulary gets zeros.
    Raises CheckpointError naming the tensor that is missing, misshapen, or the parameter that nothing fills.
    """
    import torch

    files = weight_files(path)
    shapes = {entry.hf_name: entry.shape for entry in table}
    parameters = dict(module.named_parameters())
    unfilled = set(parameters) - {p.param for p in pieces} - padded_parameters(table)
    if unfilled:
        raise CheckpointError(f"no weight rule fills parameters {sorted(unfilled)[:3]}")
    by_file: dict[Path, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.hf_name not in files:
            raise CheckpointError(f"{path}: tensor {piece.hf_name!r} is missing")
        by_file[files[piece.hf_name]].append(piece)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()  # the vocabulary's padding
        for file, its_pieces in by_file.items():
            with open_safetensors(file) as reader:
                held = set(reader.keys())
                for piece in its_pieces:
                    name = piece.hf_name
                    if name not in held:
                        raise CheckpointError(f"{file}: tensor {name!r} is not in the file that the index names for it")
                    source = reader.get_slice(name)
                    shape, wanted = tuple(source.get_shape()), shapes[name]
                    if shape != wanted:
                        raise CheckpointError(f"{file}: {name} has shape {list(shape)}, the config calls for {list(wanted)}")
                    parameters[piece.param][as_index(piece.param_slice)].copy_(source[as_index(piece.hf_slice)])


def padded_parameters(table: list[Entry]) -> set[str]:
    """Parameters of which a tensor rank may hold padding only: those split after padding (the vocabulary)."""
    return {entry.param for entry in table if isinstance(entry.rule, Split) and entry.rule.pad_to_multiple_of}


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that bear their final name, oldest first."""
    return sorted(p for p in root.glob("step_????????") if (p / STATE_FILE).is_file())


def begin_checkpoint(root: Path, step: int) -> Path:
    """An empty folder to write step `step` into, aside from its final name.

    What killed runs left half written or half deleted in `root` is removed.
    """
    for stale in (*root.glob(".step_*.partial"), *root.glob(".step_*.old")):
        shutil.rmtree(stale, ignore_errors=True)
    aside = root / f".{step_folder(root, step).name}.partial"
    aside.mkdir(parents=True)
    return aside


def drop_checkpoint(folder: Path) -> None:
    """Delete a checkpoint folder so that a kill in between never leaves half of it under its final name."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)  # what stays is removed before the next checkpoint


def finish_checkpoint(root: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Give the folder its final name and drop the oldest ones beyond `keep`."""
    aside, final = root / f".{step_folder(root, step).name}.partial", step_folder(root, step)
    with open(aside / STATE_FILE, "w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        drop_checkpoint(final)
    os.replace(aside, final)
    folder = os.open(root, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    for old in complete_checkpoints(root)[:-keep] if keep else []:
        drop_checkpoint(old)
    return final


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text())


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    # The default sharding type fails on save in megatron-core 0.16.1; this one also loads into another layout.
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _sharded_state(model: MegatronModel, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in model.chunks]
    weights = states[0] if len(states) == 1 else {f"chunk{i}": state for i, state in enumerate(states)}
    optimizer = model.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": optimizer}


def save_megatron(model: MegatronModel, folder: Path) -> None:
    """Weights and optimizer of all ranks into `folder` (Megatron dist_checkpointing). Collective."""
    from megatron.core import dist_checkpointing

    for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # zeros where no step was taken yet
    dist_checkpointing.save(_sharded_state(model, is_loading=False), str(folder))


def load_megatron(model: MegatronModel, folder: Path) -> None:
    """The inverse of `save_megatron`, into this layout; also of a folder that tools/convert.py wrote. Collective."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_agent.training.dist_checkpoint import DistCheckpoint, load_weights

    if not DistCheckpoint(folder).has_optimizer:  # converted from a Hugging Face checkpoint
        return load_weights(model, folder)
    with torch.no_grad():
        state = dist_checkpointing.load(_sharded_state(model, is_loading=True), str(folder))
        for index, chunk in enumerate(model.chunks):
            weights = state["model"] if len(model.chunks) == 1 else state["model"][f"chunk{index}"]
            chunk.load_state_dict(weights, strict=False)
        model.optimizer.load_state_dict(state["optimizer"])
