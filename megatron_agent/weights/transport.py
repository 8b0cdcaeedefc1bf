"""Buckets of bounded size from a training rank to a rollout rank on the same host, while both work.

A sender copies slices of its parameters into one of two slots that both processes see (shared memory; on GPUs device
memory through a CUDA IPC handle) and says so over a socket; the receiver copies them to where they belong and gives the
slot back. The socket carries no weights: it orders the memory, wakes the other side, and ends when that dies.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_agent.errors import WeightSyncError
from megatron_agent.models.mapping import as_index
from megatron_agent.types import ShardCopy, Slices

NUM_SLOTS = 2  # one is filled while the other is emptied
CPU_BUCKET_BYTES = 4 << 20  # stays in the cache between the two copies
GPU_BUCKET_BYTES = 64 << 20
DEADLINE_S = 600.0
CONNECT_POLL_S, ABORT_POLL_S = 0.005, 0.5
ABORTED = "aborted"  # a file in the round's folder: who has not come by now will not come any more


def shared_folder() -> Path:
    """A fresh folder in shared memory (in the temporary directory where there is none)."""
    root = Path("/dev/shm")
    run = os.environ.get("MEGATRON_AGENT_RUN", "weights")  # the reaper removes what a killed run leaves
    return Path(tempfile.mkdtemp(prefix=f"megatron_agent_{run}_", dir=root if root.is_dir() else None))


def checksum(tensor: torch.Tensor) -> int:
    """64 bits of a tensor's contents, computed where it lies: the same for equal values of equal shape on any device, in
    any memory layout. Rows are sums of 64-bit words, weighted by odd numbers: a changed word, or swapped rows, show."""
    rows = tensor.detach()
    if rows.shape[-1] * rows.element_size() % 8:  # short ones, in whole models: byte by byte
        rows = rows.contiguous().view(torch.uint8).flatten().long()
    try:
        words = rows.view(torch.int64)
    except RuntimeError:  # odd strides or offset
        words = rows.clone(memory_format=torch.contiguous_format).view(torch.int64)
    words = words[:, None] if words.dim() == 1 else words
    sums = words.sum(-1, dtype=torch.int64).flatten()
    weights = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    return int((sums * weights).sum()) & (1 << 64) - 1


def cut(copy: ShardCopy, max_elements: int) -> Iterator[ShardCopy]:
    """The copy in pieces of at most `max_elements`, along its first dims."""
    if prod(copy.shape) <= max_elements:
        yield copy
        return
    dim = next(d for d, length in enumerate(copy.shape) if length > 1)
    rows = max(1, max_elements // (prod(copy.shape) // copy.shape[dim]))
    for first in range(0, copy.shape[dim], rows):
        last = min(first + rows, copy.shape[dim])
        source, target = (_rows(box, dim, first, last) for box in (copy.src_slice, copy.dst_slice))
        yield from cut(replace(copy, src_slice=source, dst_slice=target), max_elements)


def _rows(box: Slices, dim: int, first: int, last: int) -> Slices:
    return tuple((start + first, start + last) if d == dim else (start, stop) for d, (start, stop) in enumerate(box))


def buckets(copies: Iterable[ShardCopy], max_elements: int) -> list[list[ShardCopy]]:
    """Copies from one rank to another, in order, in lists of at most `max_elements`; both sides cut alike."""
    found: list[list[ShardCopy]] = []
    room = 0
    for copy in (piece for whole in copies for piece in cut(whole, max_elements)):
        if prod(copy.shape) > room:
            found.append([])
            room = max_elements
        found[-1].append(copy)
        room -= prod(copy.shape)
    return found


def bucket_elements(dtype: torch.dtype) -> int:
    return (GPU_BUCKET_BYTES if torch.cuda.is_available() else CPU_BUCKET_BYTES) // dtype.itemsize


def views(slot: torch.Tensor, bucket: Sequence[ShardCopy]) -> Iterator[tuple[ShardCopy, torch.Tensor]]:
    """Where in a slot [elements] each copy of the bucket lies."""
    offset = 0
    for copy in bucket:
        count = prod(copy.shape)
        yield copy, slot[offset : offset + count].view(copy.shape)
        offset += count


@dataclass(frozen=True)
class Hello:
    """A sender's first message: who it is and where its slots are."""

    src_rank: int
    dtype: torch.dtype
    max_elements: int
    memory: Any  # a file in shared memory, or what rebuilds a CUDA tensor in another process


def make_slots(folder: Path, src_rank: int, dst_rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, Hello]:
    """Two slots [NUM_SLOTS, elements] in the sender's process."""
    elements = bucket_elements(dtype)
    if torch.cuda.is_available():
        from torch.multiprocessing.reductions import reduce_tensor

        slots = torch.empty(NUM_SLOTS, elements, dtype=dtype, device="cuda")
        return slots, Hello(src_rank, dtype, elements, reduce_tensor(slots))
    file = folder / f"from_{src_rank}_to_{dst_rank}.slots"
    size = NUM_SLOTS * elements
    slots = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(NUM_SLOTS, elements)
    return slots, Hello(src_rank, dtype, elements, str(file))


def open_slots(hello: Hello) -> torch.Tensor:
    """The same slots in the receiver's process."""
    if isinstance(hello.memory, str):
        size = NUM_SLOTS * hello.max_elements
        return torch.from_file(hello.memory, shared=True, size=size, dtype=hello.dtype).view(NUM_SLOTS, hello.max_elements)
    rebuild, arguments = hello.memory
    return rebuild(*arguments)


def send_message(connection: socket.socket, message: object) -> None:
    data = pickle.dumps(message)
    connection.sendall(struct.pack("<I", len(data)) + data)


def receive_message(connection: socket.socket) -> Any:
    """Raises ConnectionError when the other side is gone."""
    (length,) = struct.unpack("<I", _exactly(connection, 4))
    return pickle.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return data


def socket_name(folder: Path, dst_rank: int) -> str:
    return str(folder / f"to_{dst_rank}.sock")


class Outgoing:
    """One sender's stream to one receiver. consumes: buckets. waits for: the receiver's socket, then a free slot.
    unblocked by: the receiver, or the end of the round (`ABORTED`). produces: filled slots with checksums."""

    def __init__(self, folder: Path, copies: Sequence[ShardCopy], dtype: torch.dtype) -> None:
        self.folder, self.dst_rank = folder, copies[0].dst_rank
        self.slots, self.hello = make_slots(folder, copies[0].src_rank, self.dst_rank, dtype)
        self.buckets = buckets(copies, self.hello.max_elements)
        self.next, self.free = 0, list(range(NUM_SLOTS))
        self.connection = socket.socket(socket.AF_UNIX)
        self.is_connected, self.failure = False, ""

    @property
    def is_done(self) -> bool:
        return bool(self.failure) or (self.next == len(self.buckets) and len(self.free) == NUM_SLOTS)

    def connect(self) -> bool:
        """Whether the receiver is there by now."""
        try:
            self.connection.connect(socket_name(self.folder, self.dst_rank))
        except (FileNotFoundError, ConnectionRefusedError):
            if (self.folder / ABORTED).exists():
                self.failure = f"rollout rank {self.dst_rank} did not open its end of the weight sync"
            return False
        self.is_connected = True
        self._say(self.hello)
        return not self.failure

    def fill(self, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Send the next bucket if a slot is free -> whether it was."""
        if not self.is_connected or self.failure or not self.free or self.next == len(self.buckets):
            return False
        slot, sums = self.free.pop(), []
        for copy, view in views(self.slots[slot], self.buckets[self.next]):
            source = parameters[copy.src_param][as_index(copy.src_slice)]
            view.copy_(source)
            sums.append(checksum(source))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the other process reads without knowing our streams
        self.next += 1
        self._say((slot, sums))
        return True

    def hear(self) -> None:
        """A slot comes back, or the receiver's complaint."""
        try:
            word = receive_message(self.connection)
        except OSError as error:
            word = f"rollout rank {self.dst_rank} went away in the middle of a weight sync: {error}"
        if isinstance(word, str):
            self.failure = word
        else:
            self.free.append(word)

    def _say(self, message: object) -> None:
        try:
            send_message(self.connection, message)
        except OSError as error:
            self.failure = f"rollout rank {self.dst_rank} went away in the middle of a weight sync: {error}"


def send_all(
    folder: Path, copies: Sequence[ShardCopy], parameters: Mapping[str, torch.Tensor], deadline_s: float = DEADLINE_S
) -> dict[int, str]:
    """Everything that this rank sends in a round, to all its receivers at once -> rollout rank: why it did not get it.

    One receiver's failure does not keep the bytes from the others.
    """
    if not folder.is_dir():
        raise WeightSyncError(f"{folder} is not on this host: weights go through the memory of one host, place all ranks there")
    deadline = time.monotonic() + deadline_s
    by_target: dict[int, list[ShardCopy]] = {}
    for copy in copies:
        by_target.setdefault(copy.dst_rank, []).append(copy)
    with contextlib.ExitStack() as stack, torch.no_grad(), selectors.DefaultSelector() as selector:
        streams = [Outgoing(folder, target, parameters[target[0].src_param].dtype) for target in by_target.values()]
        for stream in streams:
            stack.enter_context(stream.connection)
        while unfinished := [stream for stream in streams if not stream.is_done]:
            for stream in unfinished:
                if not stream.is_connected and stream.connect():
                    selector.register(stream.connection, selectors.EVENT_READ, stream)
            has_sent = sum(stream.fill(parameters) for stream in unfinished) > 0  # each gets its bucket, not the first only
            waits_for_connection = not all(stream.is_connected for stream in unfinished)
            timeout = 0.0 if has_sent else CONNECT_POLL_S if waits_for_connection else max(0.0, deadline - time.monotonic())
            for key, _ in selector.select(timeout):
                key.data.hear()
                if key.data.is_done:  # the receiver closes its end now
                    selector.unregister(key.fileobj)
            if time.monotonic() > deadline:
                for stream in unfinished:
                    stream.failure = stream.failure or f"no answer from rollout rank {stream.dst_rank} in {deadline_s:.0f} s"
        return {stream.dst_rank: stream.failure for stream in streams if stream.failure}


class Sink(Protocol):
    """Where a receiver's shards go."""

    def write(self, copy: ShardCopy, values: torch.Tensor) -> torch.Tensor:
        """Put values where they belong -> the place, as it lies (its checksum is compared with the sender's)."""

    def written(self, copy: ShardCopy) -> None:
        """What was written is right."""


def receive_all(folder: Path, dst_rank: int, copies: Sequence[ShardCopy], sink: Sink, deadline_s: float = DEADLINE_S) -> None:
    """Everything that this rank gets in a round, from all its senders at once.

    Raises WeightSyncError naming the parameter whose bytes are not those that were sent, or the senders that are gone.
    """
    by_source: dict[int, list[ShardCopy]] = {}
    for copy in copies:
        by_source.setdefault(copy.src_rank, []).append(copy)
    missing = set(by_source)
    with contextlib.ExitStack() as stack, torch.no_grad(), selectors.DefaultSelector() as selector:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(socket_name(folder, dst_rank))
        server.listen(len(by_source))
        selector.register(server, selectors.EVENT_READ)
        streams: list[Incoming] = []
        deadline = time.monotonic() + deadline_s
        try:
            while missing:
                for key, _ in selector.select(ABORT_POLL_S):
                    if key.data is None:
                        connection = stack.enter_context(server.accept()[0])
                        streams.append(Incoming(connection, receive_message(connection), by_source))
                        selector.register(connection, selectors.EVENT_READ, streams[-1])
                    elif key.data.take(sink):
                        missing.discard(key.data.src_rank)
                        selector.unregister(key.fileobj)
                if time.monotonic() > deadline or (len(streams) < len(by_source) and (folder / ABORTED).exists()):
                    raise ConnectionError("they did not come" if len(streams) < len(by_source) else "too slow")
        except OSError as error:
            raise WeightSyncError(f"training ranks {sorted(missing)} did not send everything: {error}") from None
        except WeightSyncError as error:
            for stream in streams:
                with contextlib.suppress(OSError):
                    send_message(stream.connection, str(error))
            raise


class Incoming:
    """One receiver's end of a stream. consumes: filled slots. produces: verified values in the sink, free slots."""

    def __init__(self, connection: socket.socket, hello: Hello, by_source: Mapping[int, Sequence[ShardCopy]]) -> None:
        self.connection, self.src_rank = connection, hello.src_rank
        self.slots = open_slots(hello)
        self.buckets = buckets(by_source[hello.src_rank], hello.max_elements)
        self.next = 0

    def take(self, sink: Sink) -> bool:
        """The next bucket -> whether it was the last."""
        slot, sums = receive_message(self.connection)
        for (copy, values), expected in zip(views(self.slots[slot], self.buckets[self.next]), sums, strict=True):
            if checksum(sink.write(copy, values)) != expected:
                raise WeightSyncError(
                    f"parameter {copy.dst_param} {copy.dst_slice} from training rank {self.src_rank}: wrong bytes arrived"
                )
            sink.written(copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        send_message(self.connection, slot)
        self.next += 1
        return self.next == len(self.buckets)
