"""Moving the bytes of one round of weight transfer: shared memory on one host.

Each Megatron rank writes one file per vLLM rank into a folder of /dev/shm; both sides derive every offset from the
plan. CUDA IPC, NCCL and bounded buckets are not written yet.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch

from megatron_agent.errors import WeightSyncError
from megatron_agent.types import ShardCopy


def shared_folder() -> Path:
    """A fresh folder in shared memory (in the temporary directory where there is none)."""
    root = Path("/dev/shm")
    run = os.environ.get("MEGATRON_AGENT_RUN", "weights")  # the reaper removes what a killed run leaves
    return Path(tempfile.mkdtemp(prefix=f"megatron_agent_{run}_", dir=root if root.is_dir() else None))


def file_name(src_rank: int, dst_rank: int) -> str:
    return f"from_{src_rank}_to_{dst_rank}.bin"


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_shards(folder: Path, src_rank: int, shards: Sequence[tuple[ShardCopy, torch.Tensor]]) -> list[int]:
    """Write the shards of one sender, in plan order -> their checksums, taken on the tensors before they are written."""
    sums, files = [], {}
    try:
        for copy, tensor in shards:
            data = tensor.detach().to("cpu").contiguous()
            sums.append(checksum(data))
            if copy.dst_rank not in files:
                files[copy.dst_rank] = open(folder / file_name(src_rank, copy.dst_rank), "wb")  # noqa: SIM115
            files[copy.dst_rank].write(data.view(-1).view(torch.uint8).numpy().data)
    finally:
        for file in files.values():
            file.close()
    return sums


def read_shards(
    folder: Path, copies: Sequence[ShardCopy], checksums: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[ShardCopy, torch.Tensor]]:
    """Shards for one receiver, verified. `copies` in plan order with their senders' checksums.

    Raises WeightSyncError naming the parameter whose bytes did not arrive or are not those that were sent.
    """
    maps: dict[int, tuple[torch.Tensor, int]] = {}
    for copy, expected in zip(copies, checksums, strict=True):
        if copy.src_rank not in maps:
            try:
                maps[copy.src_rank] = (_mapped(folder / file_name(copy.src_rank, copy.dst_rank), dtype), 0)
            except OSError as error:
                raise WeightSyncError(
                    f"parameter {copy.dst_param} from rank {copy.src_rank} did not arrive: {error}"
                ) from error
        data, offset = maps[copy.src_rank]
        count = prod(copy.shape)
        shard = data[offset : offset + count]
        maps[copy.src_rank] = (data, offset + count)
        if shard.numel() != count or checksum(shard) != expected:
            raise WeightSyncError(f"parameter {copy.dst_param} {copy.dst_slice} from rank {copy.src_rank}: wrong bytes arrived")
        yield copy, shard.view(copy.shape)


def _mapped(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a file, whole ones only, mapped and not read. Raises OSError."""
    size = path.stat().st_size // dtype.itemsize
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
