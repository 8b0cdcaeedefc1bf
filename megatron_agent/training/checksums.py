"""Checksums of a checkpoint folder: one crc32 per stored tensor and per small file, in one text file.

`CHECKSUMS` has a line `crc32 offset length file[tab]tensor` for each of them (no tensor: the whole file) and starts with a
crc32 of the lines themselves, so that a flipped byte anywhere in the folder is found, and named, by reading it once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_agent.balance import split_balanced
from megatron_agent.errors import CheckpointError

CHECKSUMS_FILE = "CHECKSUMS"
BLOCK_BYTES = 4 << 20  # read at a time
UNCHECKED = "unchecked"  # begins the line that says why the tensors have no checksums


@dataclass(frozen=True)
class Checked:
    """`length` bytes of `file` from `offset` on; of the whole file when `tensor` is empty."""

    crc32: int
    offset: int
    length: int
    file: str
    tensor: str = ""

    def __str__(self) -> str:
        name = f"{self.file}\t{self.tensor}" if self.tensor else self.file
        return f"{self.crc32:08x} {self.offset} {self.length} {name}"

    @classmethod
    def parse(cls, line: str) -> Checked:
        crc32, offset, length, name = line.split(" ", 3)
        file, _, tensor = name.partition("\t")
        return cls(int(crc32, 16), int(offset), int(length), file, tensor)


class ChecksumStream:
    """Sums up what is written through it; all that torch.save asks of a file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.position = stream, 0
        self.error: OSError | None = None  # torch.save hides it
        self.begin()

    def begin(self) -> int:
        """The next bytes are another item's -> where it starts."""
        self.crc32 = 0
        return self.position

    def write(self, data) -> int:
        count = len(memoryview(data).cast("B"))
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            self.stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.position += count
        return count

    def flush(self) -> None:
        self.stream.flush()


def sum_file(folder: Path, name: str) -> Checked:
    crc32, length = _sum(folder / name, 0, None)
    return Checked(crc32, 0, length, name)


def write_checksums(folder: Path, items: Iterable[Checked], unchecked: str = "") -> None:
    """Of `items` and of every other file below `folder`; `unchecked` says why tensors are not among them."""
    items = list(items)
    known = {item.file for item in items} | {CHECKSUMS_FILE}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    if unchecked:
        known |= {name for name in names if name.endswith(".distcp")}
    lines = [f"{UNCHECKED} {unchecked}"] if unchecked else []
    lines += [str(item) for item in (*items, *(sum_file(folder, name) for name in names if name not in known))]
    text = ("\n".join(lines) + "\n").encode()
    with open(folder / CHECKSUMS_FILE, "wb") as file:
        file.write(f"{zlib.crc32(text):08x}\n".encode() + text)
        file.flush()
        os.fsync(file.fileno())


def read_checksums(folder: Path) -> tuple[list[Checked], str]:
    """-> what was summed up, and why tensors were not ("" when they were). Raises CheckpointError."""
    file = folder / CHECKSUMS_FILE
    try:
        first, _, text = file.read_bytes().partition(b"\n")
        if first != f"{zlib.crc32(text):08x}".encode():
            raise CheckpointError(f"{file}: damaged; {remedy(folder)}")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {CHECKSUMS_FILE} is missing: the checkpoint is not whole; {remedy(folder)}") from None
    lines = text.decode().split("\n")[:-1]
    unchecked = lines.pop(0).removeprefix(UNCHECKED).strip() if lines and lines[0].startswith(UNCHECKED) else ""
    return [Checked.parse(line) for line in lines], unchecked


def remedy(folder: Path) -> str:
    return f"restore the folder from a copy, or move {folder.name} away to go on from the checkpoint before it"


def verify_file(folder: Path, name: str) -> None:
    """Raises CheckpointError when `name` is not what was written, or has no checksum."""
    items = [item for item in read_checksums(folder)[0] if item.file == name and not item.tensor]
    problem = first_problem(folder, items) if items else f"{folder / name}: has no line in {CHECKSUMS_FILE}; {remedy(folder)}"
    if problem:
        raise CheckpointError(problem)


def share(items: Sequence[Checked], rank: int, num_ranks: int) -> list[Checked]:
    """About the same number of bytes for every rank."""
    return [items[i] for i in split_balanced([item.length for item in items], num_ranks)[rank]]


def first_problem(folder: Path, items: Iterable[Checked]) -> str | None:
    """What is wrong with the first item that is not as it was written."""
    for item in items:
        file = folder / item.file
        what = f"tensor {item.tensor}" if item.tensor else "the file"
        try:
            crc32, length = _sum(file, item.offset, item.length if item.tensor else None)
        except FileNotFoundError:
            return f"{file}: missing; {remedy(folder)}"
        if length < item.length:
            return f"{file}: truncated in {what}: {length} bytes of {item.length}; {remedy(folder)}"
        if crc32 != item.crc32 or length != item.length:
            return f"{file}: damaged: the checksum of {what} is {crc32:08x}, written was {item.crc32:08x}; {remedy(folder)}"
    return None


def _sum(file: Path, offset: int, length: int | None) -> tuple[int, int]:
    """-> crc32 and the number of bytes found; `length` None: to the end."""
    crc32, count = 0, 0
    with open(file, "rb") as stream:
        stream.seek(offset)
        while length is None or count < length:
            block = stream.read(BLOCK_BYTES if length is None else min(BLOCK_BYTES, length - count))
            if not block:
                break
            crc32, count = zlib.crc32(block, crc32), count + len(block)
    return crc32, count
