"""Tensors as regions of files: read and written in blocks, neither a tensor nor a file ever whole in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from megatron_agent.errors import CheckpointError
from megatron_agent.models.mapping import Shape, as_index
from megatron_agent.types import Slices

BLOCK_BYTES = 2 << 20  # of a tensor in memory at a time
KERNEL_COPY_BYTES = 32 << 20  # between two steps of the progress bar
WRITE_BYTES = 128 << 10  # of one call: above, the page cache wants large folios and may compact memory for them


@dataclass(frozen=True)
class Region:
    """A contiguous tensor of at least one dimension within a file."""

    file: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Copy:
    """`target[target_slice]` of some tensor is `source[source_slice]`; equal shapes."""

    source: Region
    source_slice: Slices
    target_slice: Slices


@dataclass(frozen=True)
class View:
    """A tensor put together from regions of files."""

    shape: Shape
    dtype: torch.dtype
    copies: tuple[Copy, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about BLOCK_BYTES."""
        rows = max(1, BLOCK_BYTES // (self.num_bytes // self.shape[0]))
        for start in range(0, self.shape[0], rows):
            yield start, min(start + rows, self.shape[0])


@dataclass
class Files:
    """Open files, read and written at positions (any thread)."""

    descriptors: dict[Path, int] = field(default_factory=dict)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def open(self, files: Iterable[Path], writable: bool = False) -> None:
        for file in files:
            if file not in self.descriptors:
                self.descriptors[file] = os.open(file, os.O_RDWR if writable else os.O_RDONLY)

    def read(self, view: View, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a view, in its dtype."""
        block = torch.empty((stop - start, *view.shape[1:]), dtype=view.dtype)
        for copy in view.copies:
            begin, end = copy.target_slice[0]
            first, last = max(begin, start), min(end, stop)
            if first < last:
                shift = copy.source_slice[0][0] - begin
                into = block[(slice(first - start, last - start), *as_index(copy.target_slice[1:]))]
                self._read_rows(copy.source, first + shift, last + shift, copy.source_slice[1:], into)
        return block

    def _read_rows(self, source: Region, start: int, stop: int, columns: Slices, into: torch.Tensor) -> None:
        whole = source.dtype == into.dtype and into.is_contiguous() and columns == whole_box(source.shape[1:])
        rows = into if whole else torch.empty((stop - start, *source.shape[1:]), dtype=source.dtype)
        view, at = memoryview(bytes_of(rows)), source.offset + start * source.row_bytes
        while view:
            count = os.preadv(self.descriptors[source.file], [view], at)
            if not count:
                raise CheckpointError(f"{source.file}: the file ends before the tensors that it should hold")
            view, at = view[count:], at + count
        if not whole:
            into.copy_(rows[(slice(None), *as_index(columns))])

    def write(self, target: Region, start: int, block: torch.Tensor) -> None:
        view, at = memoryview(bytes_of(block)), target.offset + start * target.row_bytes
        while view:
            count = os.pwrite(self.descriptors[target.file], view[:WRITE_BYTES], at)
            view, at = view[count:], at + count

    def copy_rows(self, target: Region, copy: Copy) -> Iterator[int]:
        """A copy of whole rows by the kernel, in steps whose sizes in bytes are yielded."""
        source, (start, stop), (into, _) = copy.source, copy.source_slice[0], copy.target_slice[0]
        left = (stop - start) * source.row_bytes
        at, to = source.offset + start * source.row_bytes, target.offset + into * target.row_bytes
        descriptors = self.descriptors[source.file], self.descriptors[target.file]
        while left:
            try:
                count = os.copy_file_range(*descriptors, min(left, KERNEL_COPY_BYTES), at, to)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                # Not between these two file systems.
                count = os.pwrite(descriptors[1], os.pread(descriptors[0], min(left, BLOCK_BYTES), at), to)
            if not count:
                raise CheckpointError(f"{source.file}: the file ends before the tensors that it should hold")
            at, to, left = at + count, to + count, left - count
            yield count


def is_whole_rows(target: Region, copy: Copy) -> bool:
    source, rest = copy.source, copy.source_slice[1:]
    return (
        source.dtype == target.dtype
        and source.shape[1:] == target.shape[1:]
        and rest == copy.target_slice[1:] == whole_box(source.shape[1:])
    )


def bytes_of(tensor: torch.Tensor):
    return tensor.flatten().view(torch.uint8).numpy()


def whole_box(shape: Shape) -> Slices:
    return tuple((0, n) for n in shape)
