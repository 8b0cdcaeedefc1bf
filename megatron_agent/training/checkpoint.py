"""Reading Hugging Face shards into a rank's parameters; the life of training checkpoints, and loading them.

A training checkpoint is a folder `step_00000010/` with Megatron's distributed checkpoint (weights, optimizer), every
rank's random state, `state.json` (step, data order, weight version, ...), `CHECKSUMS` of all that, and in `hf/` how the
model's Hugging Face folder was laid out. It is written under another name and renamed: what bears the final name is
complete. snapshot.py writes it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_agent.errors import CheckpointError
from megatron_agent.models.mapping import VALUE_HEAD, Entry, Piece, Split, as_index
from megatron_agent.training.checksums import Checked, first_problem, read_checksums, share, verify_file, write_checksums

if TYPE_CHECKING:
    import torch

    from megatron_agent.training.dist_checkpoint import DistCheckpoint
    from megatron_agent.training.megatron import MegatronModel

log = logging.getLogger(__name__)
T = TypeVar("T")
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
    if not names:
        raise CheckpointError(f"{path}: no tensor in *.safetensors files beside config.json")
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
        if piece.hf_name == VALUE_HEAD and VALUE_HEAD not in files:
            continue
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


def finish_checkpoint(root: Path, step: int, state: dict[str, Any], tensors: Sequence[Checked] = ()) -> Path:
    """Complete the folder with its state and checksums (`tensors`: assemble's) and give it its final name."""
    from megatron_agent.training.hf_export import sync

    aside, final = root / f".{step_folder(root, step).name}.partial", step_folder(root, step)
    (aside / STATE_FILE).write_text(json.dumps(state))
    write_checksums(aside, tensors)
    sync([*aside.rglob("*"), aside])
    if final.exists():
        drop_checkpoint(final)
    os.replace(aside, final)
    sync([root])
    return final


def drop_old(root: Path, keep: int, best: str = "") -> None:
    """Delete all but the newest `keep` checkpoints (0: none is deleted) and the one named `best`."""
    for old in complete_checkpoints(root)[:-keep] if keep else []:
        if old.name != best:
            drop_checkpoint(old)


def read_state(folder: Path) -> dict[str, Any]:
    """What `finish_checkpoint` was given. Raises CheckpointError when it is not what was written."""
    verify_file(folder, STATE_FILE)
    return json.loads((folder / STATE_FILE).read_text())


def save_megatron(model: MegatronModel, folder: Path) -> None:
    """Weights, optimizer and random states of all ranks into `folder`, with checksums. Collective; waits for the files."""
    import torch.distributed as dist

    from megatron_agent.training.snapshot import Saver, assemble

    saver = Saver(model)
    saver.start(folder)
    saver.wait()
    dist.barrier()
    if model.rank == 0:
        write_checksums(folder, assemble(folder, dist.get_world_size()))
    dist.barrier()


def load_megatron(model: MegatronModel, folder: Path) -> None:
    """What `save_megatron` or a run saved, into this layout; also a folder that tools/convert.py wrote. Collective.

    Raises CheckpointError on every rank, before anything of the model changed: bytes that are not those that were
    written, files that are missing, tensors that are not this model's.
    """
    import torch
    from megatron.core import dist_checkpointing

    from megatron_agent.training.optimizer_state import MASTERS, optimizer_boxes, set_optimizer_step
    from megatron_agent.training.rng import load_random_state
    from megatron_agent.training.snapshot import STEP_KEY, sharded_weights

    checkpoint, weights = opened(model, folder), sharded_weights(model)
    if not checkpoint.has_optimizer:  # converted from a Hugging Face checkpoint
        check_keys(checkpoint, weights)
        return _read_weights(model, folder, weights)
    with torch.no_grad():
        has_masters = any(key.startswith(MASTERS) for key in checkpoint.metadata.state_dict_metadata)
        state = {"model": weights, "optimizer": optimizer_boxes(model, weights, has_masters)}
        check_keys(checkpoint, state)
        # The optimizer's boxes are views of its tensors: they are read in place.
        loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
        for index, chunk in enumerate(model.chunks):
            chunk.load_state_dict(loaded["model"][f"chunk{index}"], strict=False)
        set_optimizer_step(model, loaded[STEP_KEY])
    if not has_masters:
        model.optimizer.reload_model_params()
    load_random_state(model, folder, read_state(folder)["step"] if (folder / STATE_FILE).is_file() else 0)


def load_weights(model: MegatronModel, folder: Path) -> None:
    """Weights without an optimizer's state (tools/convert.py writes such folders) into this layout. Collective.

    A critic may start from a policy's: its value head stays as it is. Raises CheckpointError as `load_megatron` does.
    """
    from megatron_agent.training.snapshot import sharded_weights

    checkpoint, wanted = opened(model, folder), sharded_weights(model)
    if VALUE_HEAD not in checkpoint.tensors:
        wanted = {chunk: {name: part for name, part in state.items() if name != VALUE_HEAD} for chunk, state in wanted.items()}
    check_keys(checkpoint, wanted, whole=False)
    _read_weights(model, folder, wanted)


def _read_weights(model: MegatronModel, folder: Path, wanted: dict[str, Any]) -> None:
    import torch
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
        for index, chunk in enumerate(model.chunks):
            chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)
    model.optimizer.reload_model_params()


def opened(model: MegatronModel, folder: Path) -> DistCheckpoint:
    """The checkpoint, compared with its checksums, a share by each rank. Raises CheckpointError on all. Collective."""
    from megatron_agent.training.dist_checkpoint import DistCheckpoint

    def verify() -> None:
        items, unchecked = read_checksums(folder)
        if unchecked and model.rank == 0:
            log.warning("%s: its tensors have no checksums: %s", folder, unchecked)
        if problem := first_problem(folder, share(items, model.rank, model.layout.world_size)):
            raise CheckpointError(problem)

    _on_all_ranks(verify)
    return _on_all_ranks(lambda: DistCheckpoint(folder))


def check_keys(checkpoint: DistCheckpoint, state: dict[str, Any], whole: bool = True) -> None:
    """Raises CheckpointError on every rank when the tensors in `state` are not those of the checkpoint, or (`whole`) not all
    of its weights. Collective."""
    import torch.distributed as dist

    from megatron_agent.training.optimizer_state import wanted_shapes

    stored = {key: tuple(value.size) for key, value in checkpoint.tensors.items()}
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, wanted_shapes(state))
    wanted = {key: shape for rank in everyones for key, shape in rank.items()}
    problems = [f"{key!r} has shape {list(stored[key])}, this model's has {list(shape)}"
                for key, shape in wanted.items() if shape is not None and stored.get(key, shape) != shape]  # fmt: skip
    problems += [f"{key!r} is missing" for key in wanted if key not in stored]
    problems += [f"{key!r} is not of this model" for key in checkpoint.keys if whole and key not in wanted]
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder}: a checkpoint of another model, or of one with other frozen parts: {problems[0]} "
            f"({len(problems)} such); give the model.path that it was trained from, or another run name"
        )


def _on_all_ranks(work: Callable[[], T]) -> T:
    """The result of `work`. Raises the first rank's CheckpointError on all of them: none goes on alone. Collective."""
    import torch.distributed as dist

    problem = ""
    try:
        result = work()
    except CheckpointError as error:
        problem = str(error)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise CheckpointError(next(filter(None, problems)))
    return result
