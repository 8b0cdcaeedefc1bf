"""Megatron's distributed checkpoint (`torch_dist`) as boxes of files: read and written without a model or process group.

Found by printing the sharded state of megatron-core 0.16.1: tensors of all decoder layers are stacked on a new first axis
under one key, `input_layernorm` and `pre_mlp_layernorm` bear the names that Transformer Engine gives them, and within a
key every tensor lies as on one tensor-parallel rank. So the place of a Hugging Face tensor is
`rule.boxes(shape, rank=0, size=1)` of the family's table; a chunk is what another layout's rank holds of it.
"""

from __future__ import annotations

import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.metadata import TensorStorageMetadata as KeyMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from megatron_agent.errors import CheckpointError
from megatron_agent.models.base import ModelFamily
from megatron_agent.models.mapping import Entry, Shape, Split, overlap, shifted, volume
from megatron_agent.training.checksums import write_checksums
from megatron_agent.training.layout import Layout, holds
from megatron_agent.training.regions import Copy, Region, View, whole_box
from megatron_agent.types import Slices

PAGE_BYTES = 4096
LINED_UP_BYTES = 1 << 20  # chunks of at least this; a record that lines up takes some 30 KB more
STORAGE_ALIGNMENT = 64  # torch.save's own
FORMAT_FILE, COMMON_FILE = "metadata.json", "common.pt"
FORMAT = dict(sharded_backend="torch_dist", sharded_backend_version=1, common_backend="torch", common_backend_version=1)
OPTIMIZER_PREFIX = "optimizer."


def bounding(boxes: Sequence[Slices]) -> Slices:
    return tuple((min(start for start, _ in dim), max(stop for _, stop in dim)) for dim in zip(*boxes))


def checkpoint_table(family: ModelFamily) -> list[Entry]:
    """The family's table in the names of a distributed checkpoint: of one rank, with Transformer Engine's names.

    Rows that differ only in vLLM's half are one.
    """
    table = family.table(Layout(), transformer_engine=True)
    return list(dict.fromkeys(replace(entry, vllm_param=None, vllm_rule=entry.rule) for entry in table))


def key_of(entry: Entry) -> tuple[str, int | None]:
    """Where the checkpoint holds the parameter of an entry -> key, index on the axis of layers (None: no such axis)."""
    if isinstance(entry.stage, int):
        return entry.param.replace(f".layers.{entry.stage}.", ".layers.", 1), entry.stage
    return entry.param, None


def num_layers_of(table: Sequence[Entry]) -> int:
    return 1 + max((e.stage for e in table if isinstance(e.stage, int)), default=-1)


@dataclass(frozen=True)
class Part:
    """`key[box]` (without the axis of layers) is `hf[hf_slice]`."""

    hf_name: str
    hf_slice: Slices
    box: Slices


@dataclass(frozen=True)
class Chunk:
    """The box of a key that one rank writes, and what fills it."""

    rank: int
    key: str
    layer: int | None
    box: Slices
    parts: tuple[Part, ...]

    @property
    def shape(self) -> Shape:
        return tuple(stop - start for start, stop in self.box)

    @property
    def offsets(self) -> Shape:
        return (*(() if self.layer is None else (self.layer,)), *(start for start, _ in self.box))


def plan_chunks(table: Sequence[Entry], layout: Layout) -> list[Chunk]:
    """The chunks of a checkpoint that ranks of `layout` would write. `table`: checkpoint_table's.

    Boxes of one rank that moved by the same distance from the rank's parameter to the key are one chunk; so gate and up
    are two, as Megatron writes them. The vocabulary's padding is left out: Megatron loads that key whatever its length.
    """
    found: dict[tuple[str, int | None, Slices], Chunk] = {}
    num_layers, tp = num_layers_of(table), layout.tensor_parallel
    for rank in range(tp * layout.pipeline_parallel):
        stages = [layout.stage(rank // tp, num_layers, chunk) for chunk in range(layout.virtual_pipeline)]
        moved: dict[tuple, list[Part]] = defaultdict(list)
        for entry in (e for e in table if any(holds(e, stage) for stage in stages)):
            for hf, local in entry.rule.boxes(entry.shape, rank % tp, tp):
                for hf_all, box_all in entry.rule.boxes(entry.shape, 0, 1):
                    if (common := overlap(hf, hf_all)) is not None:
                        box = shifted(common, hf_all, box_all)
                        distance = tuple(b - a for (a, _), (b, _) in zip(shifted(common, hf, local), box))
                        moved[(*key_of(entry), distance)].append(Part(entry.hf_name, common, box))
        for (key, layer, _), parts in moved.items():
            box = bounding([p.box for p in parts])
            assert volume(box) == sum(volume(p.box) for p in parts), f"{key}: a chunk with holes"
            found.setdefault((key, layer, box), Chunk(rank, key, layer, box, tuple(parts)))
    return list(found.values())


def write_skeleton(
    folder: Path, chunks: Sequence[Chunk], dtypes: dict[str, torch.dtype], page_offsets: Sequence[int] | None = None
) -> list[Region]:
    """A checkpoint folder with room for `chunks` (dtype by key) -> where each chunk's bytes go.

    The tensors' bytes are holes in the files: they are filled afterwards in any order, with a block in memory.
    `page_offsets`: per chunk, where in a page its bytes start at their source. Large chunks then start so too: the kernel
    copies page by page, and pages that do not line up cost it half as much again.
    """
    sizes: dict[str, Shape] = {}
    num_layers = 1 + max((c.layer for c in chunks if c.layer is not None), default=-1)
    for chunk in chunks:
        ends = tuple(stop for _, stop in chunk.box)
        sizes[chunk.key] = tuple(map(max, ends, sizes.get(chunk.key, ends)))
    items: dict[MetadataIndex, tuple[int, WriteItem]] = {}
    in_page: dict[MetadataIndex, int] = {}
    for number, chunk in enumerate(chunks):
        stacked = chunk.layer is not None
        size = (*((num_layers,) if stacked else ()), *sizes[chunk.key])
        at = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(((1,) if stacked else ()) + chunk.shape))
        data = TensorWriteData(at, TensorProperties(dtype=dtypes[chunk.key]), torch.Size(size))
        index = MetadataIndex(chunk.key, chunk.offsets)
        items[index] = (chunk.rank, WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        if page_offsets is not None and prod(chunk.shape) * dtypes[chunk.key].itemsize >= LINED_UP_BYTES:
            in_page[index] = page_offsets[number] % PAGE_BYTES
        for name in _extra_states(chunk, num_layers):
            index = MetadataIndex(name)
            items.setdefault(index, (chunk.rank, WriteItem(index, WriteItemType.BYTE_IO)))
    ranks = [[item for rank, item in items.values() if rank == r] for r in range(1 + max(c.rank for c in chunks))]
    plans, metadata = create_default_global_save_plan([SavePlan(rank_items) for rank_items in ranks])
    results = [_write_holes(folder / f"__{rank}_0.distcp", plan.items, in_page) for rank, plan in enumerate(plans)]
    FileSystemWriter(folder).finish(metadata, results)
    torch.save({}, folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))
    write_checksums(folder, [], unchecked="copied from file to file; `tools/convert.py verify` compares them with the source")
    checkpoint = DistCheckpoint(folder)
    return [checkpoint.region(chunk.key, torch.Size(chunk.offsets), chunk.layer) for chunk in chunks]


def _write_holes(file: Path, items: Sequence[WriteItem], in_page: dict[MetadataIndex, int]) -> list[WriteResult]:
    """What FileSystemWriter.write_data does, but to a stream that can seek over the bytes of a tensor."""
    results = []
    try:
        with open(file, "wb") as stream, torch.serialization.skip_data():
            for item in items:
                if item.index in in_page:
                    stream.seek((in_page[item.index] - stream.tell()) % PAGE_BYTES, os.SEEK_CUR)
                start = stream.tell()
                data = item.tensor_data
                alignment = PAGE_BYTES if item.index in in_page else STORAGE_ALIGNMENT
                with config.patch("save.storage_alignment", alignment):  # type: ignore[attr-defined]
                    # Layers without FP8 state write [None].
                    torch.save([None] if data is None else torch.empty(data.chunk.sizes, dtype=data.properties.dtype), stream)
                info = _StorageInfo(file.name, start, stream.tell() - start)
                results.append(WriteResult(item.index, info.length, info))
    except RuntimeError as error:  # torch's, in place of the OSError that it met
        raise CheckpointError(f"{file}: could not be written: {error}") from error
    return results


def _extra_states(chunk: Chunk, num_layers: int) -> Iterator[str]:
    """Megatron asks for the FP8 state of every linear layer, and Transformer Engine for that of core attention."""
    module = chunk.key.rpartition(".")[0]
    if chunk.layer is not None and module.rpartition(".")[2].startswith("linear_"):
        yield f"{module}._extra_state/shard_{chunk.layer}_{num_layers}"
        if module.endswith(".self_attention.linear_qkv"):
            yield f"{module.removesuffix('linear_qkv')}core_attention._extra_state/shard_{chunk.layer}_{num_layers}"


class DistCheckpoint:
    """A folder in Megatron's `torch_dist` format. Raises CheckpointError when it is not one, or not a whole one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / FORMAT_FILE).is_file() or not (folder / ".metadata").is_file():
            raise CheckpointError(f"{folder}: not a distributed checkpoint (no {FORMAT_FILE} or no .metadata)")
        try:
            backend = json.loads((folder / FORMAT_FILE).read_text())["sharded_backend"]
            self.metadata: Metadata = FileSystemReader(folder).read_metadata()
        except (ValueError, KeyError, TypeError, EOFError, UnpicklingError, AttributeError, ImportError) as error:
            raise CheckpointError(f"{folder}: damaged {FORMAT_FILE} or .metadata: {error!r}") from error
        if backend != "torch_dist":
            raise CheckpointError(f"{folder}: format {backend!r}, only 'torch_dist' can be read")
        self.tensors = {k: v for k, v in self.metadata.state_dict_metadata.items() if isinstance(v, KeyMetadata)}
        self.has_optimizer = any(key.startswith(OPTIMIZER_PREFIX) for key in self.tensors)
        self.keys = {k: v for k, v in self.tensors.items() if not k.startswith(OPTIMIZER_PREFIX)}
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = defaultdict(int)
        for info in self.metadata.storage_data.values():
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for name, end in ends.items():
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{self.folder}: {name} is missing")
            if file.stat().st_size < end:
                raise CheckpointError(f"{file}: truncated: {file.stat().st_size} bytes of {end}")

    def region(self, key: str, offsets: torch.Size, layer: int | None) -> Region:
        """Where the bytes of a chunk lie; of one `layer` of it when the key is stacked."""
        info = self.metadata.storage_data[MetadataIndex(key, offsets)]
        file = self.folder / info.relative_path
        try:
            with open(file, "rb") as stream:
                window = _Window(stream, info.offset, info.length)
                tensor = torch.load(window, map_location="meta", weights_only=True)  # type: ignore[arg-type]
        except (RuntimeError, UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{file}: damaged at {key!r}: {error}") from error
        if not tensor.is_contiguous() or tensor.storage_offset():
            raise CheckpointError(f"{file}: {key!r} is not stored contiguously")
        offset = info.offset + tensor.untyped_storage()._checkpoint_offset
        if layer is None:
            return Region(file, offset, tuple(tensor.shape), tensor.dtype)
        row = Region(file, offset, tuple(tensor.shape), tensor.dtype).row_bytes
        return Region(file, offset + (layer - offsets[0]) * row, tuple(tensor.shape[1:]), tensor.dtype)

    def views(self, table: Sequence[Entry]) -> dict[str, View]:
        """HF name -> the tensor as this checkpoint holds it. `table`: checkpoint_table's.

        Raises CheckpointError naming the key that is missing, misshapen or has no HF tensor.
        """
        keys, sizes = self.keys, _key_sizes(table)
        if unknown := sorted(set(keys) - set(sizes)):
            raise CheckpointError(f"{self.folder}: the config has no tensor for {unknown[0]!r} ({len(unknown)} such keys)")
        copies: dict[str, list[Copy]] = defaultdict(list)
        regions: dict[tuple[str, torch.Size, int | None], Region] = {}
        for entry in table:
            key, layer = key_of(entry)
            self._check_key(key, sizes[key], entry)
            for chunk in keys[key].chunks:
                held = tuple((a, a + n) for a, n in zip(chunk.offsets, chunk.sizes))
                if layer is not None:
                    if not held[0][0] <= layer < held[0][1]:
                        continue
                    held = held[1:]
                for hf, box in entry.rule.boxes(entry.shape, 0, 1):
                    if (common := overlap(box, held)) is not None:
                        at = (key, chunk.offsets, layer)
                        if at not in regions:
                            regions[at] = self.region(*at)
                        source = shifted(common, held, whole_box(regions[at].shape))
                        copies[entry.hf_name].append(Copy(regions[at], source, shifted(common, box, hf)))
        return {name: self._view(name, shape, copies[name]) for name, shape in shapes_of(table).items()}

    def _check_key(self, key: str, size: Shape, entry: Entry) -> None:
        if key not in self.keys:
            raise CheckpointError(f"{self.folder}: {key!r} is missing (the place of {entry.hf_name})")
        found = tuple(self.keys[key].size)
        padded = isinstance(entry.rule, Split) and entry.rule.pad_to_multiple_of
        if found != size and not (padded and found[0] >= size[0] and found[1:] == size[1:]):
            raise CheckpointError(f"{self.folder}: {key!r} has shape {list(found)}, the config calls for {list(size)}")

    def _view(self, name: str, shape: Shape, copies: list[Copy]) -> View:
        if sum(volume(c.target_slice) for c in copies) != prod(shape):
            raise CheckpointError(f"{self.folder}: the chunks do not cover {name!r}")
        return View(shape, copies[0].source.dtype, tuple(copies))


class _Window(io.RawIOBase):
    """A range of a file as a file of its own, which is what torch.load reads a chunk from."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self.stream, self.start, self.length, self.position = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer) -> int:  # type: ignore[override]
        self.stream.seek(self.start + self.position)
        count = self.stream.readinto(memoryview(buffer)[: max(0, self.length - self.position)])
        self.position += count
        return count


def shapes_of(table: Sequence[Entry]) -> dict[str, Shape]:
    return {entry.hf_name: entry.shape for entry in table}


def _key_sizes(table: Sequence[Entry]) -> dict[str, Shape]:
    """Global shapes of all keys, the vocabulary without padding."""
    boxes: dict[str, list[Slices]] = defaultdict(list)
    for entry in table:
        key, layer = key_of(entry)
        stacked = () if layer is None else ((layer, layer + 1),)
        boxes[key] += [(*stacked, *box) for _, box in entry.rule.boxes(entry.shape, 0, 1)]
    return {key: tuple(stop for _, stop in bounding(its)) for key, its in boxes.items()}
