"""What carries the bytes of a bucket from one rank to another: two slots, and how a filled one gets to the other side.

Shared memory and CUDA IPC: both processes see the same slots. NCCL and gloo: each side has two of its own, and a process
group of the two ranks copies from one to the other. Groups are made once per pair of processes and kept.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_agent.errors import WeightSyncError
from megatron_agent.types import TRANSPORTS
from megatron_agent.weights.meeting import SHARED_MEMORY, Announcement, Meeting, host_name

NUM_SLOTS = 2  # one is filled while the other is emptied
CPU_BUCKET_BYTES = 4 << 20  # stays in the cache between the two copies
GPU_BUCKET_BYTES = 64 << 20
SMALLEST_SLOT_BYTES = 256 << 10
GROUP_TIMEOUT = timedelta(minutes=2)
SENDER, RECEIVER = 0, 1  # ranks in a group of two
_groups: dict[tuple[str, int], dist.ProcessGroup] = {}  # by name and side, in this process
_group_names: dict[tuple[int, int, str], str] = {}  # the sender's: (its rank, the receiver's, the receiver's process)


@dataclass(frozen=True)
class Hello:
    """A sender's first message: who it is and where its slots are."""

    src_rank: int
    dtype: torch.dtype
    max_elements: int  # of one slot
    kind: str  # "shared_memory", "cuda_ipc", "nccl", "gloo"
    memory: Any  # a file, what rebuilds a CUDA tensor in another process, or the name of a group


def choose(to: Announcement, transport: str) -> str:
    """What carries bytes from this process there. Raises WeightSyncError where the transport asked for cannot."""
    on_gpus, same_host = torch.cuda.is_available() and to.on_gpu, host_name() == to.host
    possible = ["gloo"]
    if on_gpus:
        possible = ["nccl", *possible]
    if same_host:
        possible = [*(["cuda_ipc"] if on_gpus else []), "shared_memory", *possible]
    if transport == "auto":
        return possible[0]
    if transport not in possible:
        raise WeightSyncError(
            f"rollout.weight_transport={transport!r} cannot reach a receiver on {'the same' if same_host else 'another'} host, "
            f"{'both' if on_gpus else 'not both'} on GPUs; possible: {', '.join(possible)}, or auto ({', '.join(TRANSPORTS)})"
        )
    return transport


def slot_elements(kind: str, num_streams: int, dtype: torch.dtype) -> int:
    """All streams of a rank together have two buckets of memory."""
    whole = GPU_BUCKET_BYTES if kind in ("cuda_ipc", "nccl") else CPU_BUCKET_BYTES
    return max(min(whole, SMALLEST_SLOT_BYTES), whole // num_streams) // dtype.itemsize


def shared_file(num_bytes: int) -> str:
    """A new file in shared memory (in the temporary directory where there is none)."""
    run = os.environ.get("MEGATRON_AGENT_RUN", "weights")  # the reaper removes what a killed run leaves
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    handle, path = tempfile.mkstemp(prefix=f"megatron_agent_{run}_", dir=folder)
    os.posix_fallocate(handle, 0, num_bytes)  # full shared memory is an error here, not a SIGBUS later
    os.close(handle)
    return path


@dataclass
class Shared:
    """Memory that both processes see; `file` is unlinked when the sender closes."""

    slots: torch.Tensor  # [NUM_SLOTS, elements]
    file: str = ""

    def send(self, slot: int, num_elements: int) -> None: ...

    def receive(self, slot: int, num_elements: int) -> None: ...

    def close(self) -> None:
        if self.file:
            Path(self.file).unlink(missing_ok=True)


@dataclass
class Grouped:
    """Slots of one side, and the group that copies them from the sender's to the receiver's."""

    slots: torch.Tensor  # [NUM_SLOTS, elements]
    group: dist.ProcessGroup | None
    sending: dict[int, dist.Work] = field(default_factory=dict)

    def send(self, slot: int, num_elements: int) -> None:
        """A slot is filled; called by the sender after it has told the receiver."""
        assert self.group is not None
        # gloo knows no bfloat16 on some systems, both know bytes; a slot is filled again only when it was received.
        self.sending[slot] = self.group.send([self._bytes(slot, num_elements)], RECEIVER, slot)

    def receive(self, slot: int, num_elements: int) -> None:
        """Until the slot's values are there; called by the receiver once it has been told."""
        assert self.group is not None
        self.group.recv([self._bytes(slot, num_elements)], SENDER, slot).wait()

    def _bytes(self, slot: int, num_elements: int) -> torch.Tensor:
        return self.slots[slot, :num_elements].view(torch.uint8)

    def close(self) -> None:
        self.sending.clear()


def open_sender(
    meeting: Meeting,
    to: Announcement,
    pair: tuple[int, int],
    dtype: torch.dtype,
    num_streams: int,
    elements: int | None = None,
) -> tuple[Shared | Grouped, Hello]:
    """The sender's end for `pair` (sender, receiver), slots of `elements` (None: the sender's share of its memory).

    A group has not been joined yet: `join` does, once the receiver can read the Hello.
    """
    kind = choose(to, meeting.transport)
    elements = elements or slot_elements(kind, max(num_streams, to.num_streams), dtype)
    src_rank, dst_rank = pair
    shape = (NUM_SLOTS, elements)
    if kind == "shared_memory":
        file = shared_file(NUM_SLOTS * elements * dtype.itemsize)
        slots = torch.from_file(file, shared=True, size=NUM_SLOTS * elements, dtype=dtype).view(shape)
        return Shared(slots, file), Hello(src_rank, dtype, elements, kind, file)
    device = "cpu" if kind == "gloo" else "cuda"
    slots = torch.empty(shape, dtype=dtype, device=device)
    if kind == "cuda_ipc":
        from torch.multiprocessing.reductions import reduce_tensor

        return Shared(slots), Hello(src_rank, dtype, elements, kind, reduce_tensor(slots))
    name = _group_names.setdefault((src_rank, dst_rank, to.process), f"{kind}/{src_rank}/{dst_rank}/{uuid.uuid4().hex[:12]}")
    return Grouped(slots, _groups.get((name, SENDER))), Hello(src_rank, dtype, elements, kind, name)


def join(carrier: Shared | Grouped, hello: Hello, meeting: Meeting) -> None:
    """The sender's part in making a group; waits for the receiver, which makes it on reading the Hello.

    A sender is in one such wait at a time, and a receiver joins only who waits for it: nobody waits in a circle.
    """
    if isinstance(carrier, Grouped):
        carrier.group = _group(hello, meeting, SENDER)


def open_receiver(hello: Hello, meeting: Meeting) -> Shared | Grouped:
    """The receiver's end of what the Hello describes. Raises FileNotFoundError when the sender is gone already."""
    shape = (NUM_SLOTS, hello.max_elements)
    if hello.kind == "shared_memory":
        # Not torch.from_file, which makes a file of zeros where the sender is gone and has unlinked its own.
        with open(hello.memory, "r+b") as file:
            return Shared(torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=hello.dtype).view(shape))
    if hello.kind == "cuda_ipc":
        rebuild, arguments = hello.memory
        return Shared(rebuild(*arguments))
    slots = torch.empty(shape, dtype=hello.dtype, device="cpu" if hello.kind == "gloo" else "cuda")
    return Grouped(slots, _group(hello, meeting, RECEIVER))


def drop(hello: Hello) -> None:
    """A stream failed: what its group has under way is unknown, so the next round makes another."""
    for side in (SENDER, RECEIVER):
        _groups.pop((str(hello.memory), side), None)
    for pair in [pair for pair, name in _group_names.items() if name == hello.memory]:
        del _group_names[pair]


def _group(hello: Hello, meeting: Meeting, rank: int) -> dist.ProcessGroup:
    name = (hello.memory, rank)
    if name not in _groups:
        store = dist.PrefixStore(hello.memory, meeting.new_store())  # making a group blocks it
        if hello.kind == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = GROUP_TIMEOUT
            group: Any = dist.ProcessGroupNCCL(store, rank, 2, options)  # a Backend, which has the same calls
            first = torch.zeros(1, device="cuda")  # NCCL connects on the first use
            (group.send([first], RECEIVER, 0) if rank == SENDER else group.recv([first], SENDER, 0)).wait()
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=meeting.local_address())]
            options._timeout = GROUP_TIMEOUT
            group = dist.ProcessGroupGloo(store, rank, 2, options)
        _groups[name] = group
    return _groups[name]
