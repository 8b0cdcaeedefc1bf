"""Hugging Face folders as files: read without loading, and written from a distributed checkpoint, byte for byte.

`HfLayout` keeps the headers of the original safetensors files as they were (names, order, dtypes, offsets, metadata,
padding), so that Hugging Face -> Megatron -> Hugging Face gives the same files. Everything is copied in blocks:
neither a tensor nor a file is ever whole in memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from megatron_agent import registry
from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.models.base import ModelFamily
from megatron_agent.models.mapping import Entry, Shape
from megatron_agent.training.dist_checkpoint import DistCheckpoint, checkpoint_table, shapes_of
from megatron_agent.training.regions import Copy, Files, Region, View, is_whole_rows

log = logging.getLogger(__name__)

HF_FOLDER, LAYOUT_FILE, INDEX_FILE = "hf", "hf_layout.json", "model.safetensors.index.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WRITE_BACK_BYTES = 4 << 20
Advance = Callable[[int], object]  # called with the number of bytes just written


@dataclass(frozen=True)
class ShardFile:
    """The header of one safetensors file: the JSON text with its padding, as it stands in the file."""

    name: str
    header: str

    @property
    def data_start(self) -> int:
        return 8 + len(self.header.encode())

    def regions(self, folder: Path) -> dict[str, Region]:
        """Tensor name -> where it lies, in the order of the bytes. Raises CheckpointError for a header that is nonsense."""
        try:
            rows = {k: v for k, v in json.loads(self.header).items() if k != "__metadata__"}
            found = {
                name: Region(folder / self.name, self.data_start + row["data_offsets"][0], tuple(row["shape"]) or (1,),
                             DTYPES[row["dtype"]])
                for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"])
            }  # fmt: skip
            spans = [tuple(rows[name]["data_offsets"]) for name in found]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{folder / self.name}: damaged safetensors header: {error!r}") from error
        sizes = [region.row_bytes * region.shape[0] for region in found.values()]
        if [stop - start for start, stop in spans] != sizes or any(a[1] != b[0] for a, b in pairwise([(0, 0), *spans])):
            raise CheckpointError(f"{folder / self.name}: damaged safetensors header: offsets and shapes do not agree")
        return found


@dataclass(frozen=True)
class HfLayout:
    """How a Hugging Face checkpoint is cut into files."""

    files: tuple[ShardFile, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> HfLayout:
        """From the headers of the safetensors files. Raises CheckpointError naming the file that is missing or damaged."""
        index = _read_index(folder)
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{folder}: no *.safetensors file")
        layout = cls(tuple(_read_header(folder / name) for name in names))
        where = [(name, file.name) for file in layout.files for name in file.regions(folder)]
        if index is None:
            twice = sorted({name for name, _ in where if sum(name == other for other, _ in where) > 1})
            if len(layout.files) > 1 and twice:
                raise CheckpointError(f"{folder}: tensor {twice[0]!r} is in several files and there is no {INDEX_FILE}")
        elif wrong := sorted(set(index.items()) ^ set(where)):
            name, file = wrong[0]
            said = "names it there, but it is not" if (name, file) in index.items() else "does not name it"
            raise CheckpointError(f"{folder}: tensor {name!r} of {file}: {INDEX_FILE} {said}")
        return layout

    @classmethod
    def read(cls, file: Path) -> HfLayout:
        try:
            return cls(tuple(ShardFile(row["name"], row["header"]) for row in json.loads(file.read_text())["files"]))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{file}: damaged: {error!r}") from error

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"files": [vars(shard) for shard in self.files]}))

    def regions(self, folder: Path) -> dict[str, Region]:
        return {name: region for file in self.files for name, region in file.regions(folder).items()}

    def num_bytes(self, folder: Path) -> int:
        return sum(f.data_start for f in self.files) + sum(r.row_bytes * r.shape[0] for r in self.regions(folder).values())


def _read_index(folder: Path) -> dict[str, str] | None:
    file = folder / INDEX_FILE
    if not file.is_file():
        return None
    try:
        index = dict(json.loads(file.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    missing = sorted({name for name in index.values() if not (folder / name).is_file()})
    if missing:
        raise CheckpointError(f"{folder}: {INDEX_FILE} names files that are not there: {missing[:3]}")
    return index


def _read_header(file: Path) -> ShardFile:
    """Raises CheckpointError when the file is shorter or longer than its header says."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file}: truncated or not a safetensors file: {size} bytes, a header of {length}")
        try:
            shard = ShardFile(file.name, stream.read(length).decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: damaged safetensors header: {error}") from error
    regions = shard.regions(file.parent).values()
    end = max((r.offset + r.row_bytes * r.shape[0] for r in regions), default=shard.data_start)
    if size != end:
        raise CheckpointError(f"{file}: {'truncated' if size < end else 'too long'}: {size} bytes, the header says {end}")
    return shard


def as_views(regions: Mapping[str, Region]) -> dict[str, View]:
    """HF name -> the tensor as an HF folder holds it."""
    views = {}
    for name, region in regions.items():
        box = tuple((0, n) for n in region.shape)
        views[name] = View(region.shape, region.dtype, (Copy(region, box, box),))
    return views


def check_against_table(where: Path, regions: Mapping[str, Region], table: Sequence[Entry]) -> None:
    """Raises CheckpointError naming the tensor by which the weights contradict the config."""
    shapes: dict[str, Shape] = shapes_of(table)
    for what, names in (("is missing", set(shapes) - set(regions)), ("is not of this model", set(regions) - set(shapes))):
        if names:
            raise CheckpointError(f"{where}: tensor {min(names)!r} {what}; {len(names)} such against its config.json")
    for name, region in regions.items():
        if region.shape != shapes[name]:
            raise CheckpointError(f"{where}: {name} has shape {list(region.shape)}, config.json calls for {list(shapes[name])}")


def read_family(folder: Path) -> ModelFamily:
    """The model family of a config.json, whether or not weights lie beside it."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json")
    try:
        model_type = str(json.loads(file.read_text())["model_type"])
        family: ModelFamily = registry.resolve("models", model_type)(folder)
        return family
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not a config of a known model: {error!r}") from error


def carried_files(folder: Path) -> list[Path]:
    """What travels with the weights: config, tokenizer, processor, index, licence."""
    found = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return [p for p in found if p.suffix not in WEIGHT_SUFFIXES and p.name != LAYOUT_FILE]


def carry(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in carried_files(source):
        shutil.copyfile(file, target / file.name)


def hf_side(checkpoint: Path, like: Path | None) -> tuple[Path, HfLayout]:
    """Where the HF layout of a Megatron checkpoint is described: `like`, or the checkpoint's own hf/."""
    if like is not None:
        return like, HfLayout.of_folder(like)
    own = checkpoint / HF_FOLDER
    if not (own / LAYOUT_FILE).is_file():
        raise CheckpointError(f"{checkpoint}: no {HF_FOLDER}/{LAYOUT_FILE}; say --like HF_DIR, the model it was trained from")
    return own, HfLayout.read(own / LAYOUT_FILE)


def export_hf(checkpoint: Path, out: Path, like: Path | None = None, advance: Advance | None = None, workers: int = 2) -> None:
    """Weights of a distributed checkpoint -> a Hugging Face folder, in the files and dtypes of `like`.

    `like` None: those of the checkpoint's own hf/. Raises CheckpointError; nothing bears the name `out` then.
    """
    source, layout = hf_side(checkpoint, like)
    table = checkpoint_table(read_family(source))
    check_against_table(source, layout.regions(source), table)
    views = DistCheckpoint(checkpoint).views(table)
    casts = {name for name, region in layout.regions(source).items() if region.dtype != views[name].dtype}
    if casts:
        log.warning("%d tensors change dtype, %s among them", len(casts), min(casts))
    with written_aside(out, layout.num_bytes(source)) as aside:
        carry(source, aside)
        for file in layout.files:
            with open(aside / file.name, "wb") as stream:
                stream.write(len(file.header.encode()).to_bytes(8, "little") + file.header.encode())
        fill([(region, views[name]) for name, region in layout.regions(aside).items()], advance, workers)


def fill(targets: Sequence[tuple[Region, View]], advance: Advance | None = None, workers: int = 2) -> None:
    """Write every view into its region, `workers` regions at a time: whole rows by the kernel, others in blocks.

    Raises OSError before the first byte where the file system has no room for all of them.
    """
    files, lock = Files(), threading.Lock()

    def steps(target: Region, view: View) -> Iterator[int]:
        if all(is_whole_rows(target, copy) for copy in view.copies):
            for copy in view.copies:
                yield from files.copy_rows(target, copy)
            return
        wanted = replace(view, dtype=target.dtype)
        for start, stop in wanted.blocks():
            block = files.read(wanted, start, stop)
            files.write(target, start, block)
            yield block.nbytes

    def one(target: Region, view: View) -> None:
        waiting = 0
        for num_bytes in steps(target, view):
            waiting += num_bytes
            if waiting >= WRITE_BACK_BYTES:
                start_write_back(files.descriptors[target.file], target)
                waiting = 0
            if advance is not None:
                with lock:
                    advance(num_bytes)

    with files, ThreadPoolExecutor(workers) as pool:
        files.open({target.file for target, _ in targets}, writable=True)
        for file in {target.file for target, _ in targets}:
            end = max(target.offset + target.row_bytes * target.shape[0] for target, _ in targets if target.file == file)
            os.posix_fallocate(files.descriptors[file], 0, end)
        files.open({copy.source.file for _, view in targets for copy in view.copies})
        jobs = [pool.submit(one, *target) for target in targets]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()


def start_write_back(descriptor: int, region: Region) -> None:
    """The disk works while the next bytes are copied, and the final fsync finds little left to wait for.

    Linux starts to write the dirty pages of a range that is said to be needed no more (mm/fadvise.c), and goes on.
    """
    os.posix_fadvise(descriptor, region.offset, region.row_bytes * region.shape[0], os.POSIX_FADV_DONTNEED)


def sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def written_aside(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into that gets the name `out` when all went well, and goes otherwise.

    Raises CheckpointError when `out` is in use, there is no room for `needed_bytes`, or writing fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: the output folder is not empty; name a new one")
    aside = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        free = shutil.disk_usage(aside).free
        if free < needed_bytes:
            raise CheckpointError(f"{out}: no room: {needed_bytes:,} bytes to write, {free:,} free")
        yield aside
        sync(p for p in aside.rglob("*"))
        os.replace(aside, out)
        sync([out.parent])
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{out}: could not be written: {error}") from error
        raise
