"""Saving a training checkpoint without stopping the training: a copy in host memory now, the files afterwards.

Every rank copies what it stores (`Saver.start`, the only stall) and writes it in a thread, to a file of its own with
checksums of the very bytes, then a `Part` beside it. No rank talks to another: whoever owns the folder waits for all
parts and makes one Megatron `torch_dist` checkpoint of them (`assemble`). Megatron's own asynchronous writer forks, which
does not mix with the threads of gloo and Ray, and exchanges plans and results between ranks while they should train.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_agent.errors import CheckpointError
from megatron_agent.training.checksums import Checked, ChecksumStream
from megatron_agent.training.dist_checkpoint import COMMON_FILE, FORMAT, FORMAT_FILE
from megatron_agent.training.layout import Layout
from megatron_agent.training.optimizer_state import optimizer_boxes, optimizer_step
from megatron_agent.training.rng import random_state, save_random_states

if TYPE_CHECKING:
    from megatron_agent.training.megatron import MegatronModel

log = logging.getLogger(__name__)
STEP_KEY = "optimizer_step"


@dataclass(frozen=True)
class Part:
    """What one rank has written."""

    layout: Layout
    plan: SavePlan
    results: list[WriteResult]
    checked: list[Checked]
    optimizer_step: int
    random_state: dict[str, Any]


class Saver:
    """A rank's snapshots. consumes: the model's state. waits for: its own last write. produces: a file and a part.

    At most one snapshot exists; its host memory is kept for the next one (pinned where there is CUDA).
    """

    def __init__(self, model: MegatronModel) -> None:
        self.model = model
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def start(self, folder: Path) -> None:
        """Copy the state; when this returns the model may change. Raises CheckpointError if the last write failed."""
        self.wait()
        planner = _planner(self.model)
        plan = planner.create_local_plan()
        contents = [(item, self._copy(item, planner.resolve_data(item))) for item in plan.items]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        part = Part(self.model.layout, plan, [], [], optimizer_step(self.model), random_state())
        self._writing = self._threads.submit(_write, folder, self.model.rank, contents, part)

    def _copy(self, item: WriteItem, source: torch.Tensor | io.BytesIO) -> torch.Tensor | io.BytesIO:
        if isinstance(source, io.BytesIO):
            return source
        source = source.detach()
        buffer = self._buffers.get(item.index)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=torch.cuda.is_available())
            self._buffers[item.index] = buffer
        return buffer.copy_(source, non_blocking=True)

    def is_writing(self) -> bool:
        """Raises CheckpointError if the write failed."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._writing is not None

    def wait(self) -> None:
        """Until the last snapshot is written. Raises CheckpointError if that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _planner(model: MegatronModel):
    """torch's planner over what this rank stores of weights and optimizer. No collective."""
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

    weights = sharded_weights(model)
    state = {"model": weights, "optimizer": optimizer_boxes(model, weights)}
    stored, _ = save_preprocess(state, validate_access_integrity=False)  # `assemble` checks the whole
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(stored, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(flat, is_loading=False), is_coordinator=model.rank == 0)
    return planner


def sharded_weights(model: MegatronModel) -> dict[str, Any]:
    """Megatron's description of the parameters, by model chunk."""
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"chunk{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(model.chunks)}


def _write(folder: Path, rank: int, contents: list[tuple[WriteItem, torch.Tensor | io.BytesIO]], part: Part) -> None:
    file, stream = folder / f"__{rank}_0.distcp", None
    try:
        with open(file, "wb") as raw:
            stream = ChecksumStream(raw)
            for item, data in contents:
                start = stream.begin()
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    torch.save(data, stream)  # type: ignore[arg-type]
                length = stream.position - start
                info = _StorageInfo(file.name, start, length)
                part.results.append(WriteResult(item.index, length, info))
                part.checked.append(Checked(stream.crc32, start, length, file.name, _name(item.index)))
            raw.flush()
            os.fsync(raw.fileno())
        written = folder / f".part_{rank:05d}.tmp"
        with open(written, "wb") as raw:
            pickle.dump(part, raw)
        os.replace(written, part_file(folder, rank))
    except (OSError, RuntimeError) as error:  # torch raises the second in place of the first
        reason = stream.error if stream is not None and stream.error is not None else error
        raise CheckpointError(f"rank {rank}: {file}: the checkpoint could not be written: {reason}") from error


def _name(index: MetadataIndex) -> str:
    return index.fqn if index.offset is None else f"{index.fqn} at {list(index.offset)}"


def part_file(folder: Path, rank: int) -> Path:
    return folder / f".part_{rank:05d}"


def assemble(folder: Path, num_ranks: int) -> list[Checked]:
    """Make one checkpoint of all ranks' parts -> checksums of its tensors. Any process may call it, once.

    Raises CheckpointError if the parts do not cover every tensor exactly once.
    """
    parts: list[Part] = [pickle.loads(part_file(folder, rank).read_bytes()) for rank in range(num_ranks)]
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        _, metadata = planner.create_global_plan([part.plan for part in parts])
    except ValueError as error:
        raise CheckpointError(f"{folder}: the ranks' shards do not make whole tensors: {error}") from error
    FileSystemWriter(folder).finish(metadata, [part.results for part in parts])
    torch.save({STEP_KEY: max(part.optimizer_step for part in parts)}, folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))
    save_random_states(folder, parts[0].layout, [part.random_state for part in parts])
    for rank in range(num_ranks):
        part_file(folder, rank).unlink()
    return [item for part in parts for item in part.checked]
