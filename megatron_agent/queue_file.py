"""Where a run keeps what is generated and not trained yet: beside its checkpoints, with the order of the data."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_agent.errors import CheckpointError
from megatron_agent.rollout.ahead import Snapshot, from_bytes, to_bytes
from megatron_agent.stages import Stages
from megatron_agent.training.checkpoint import complete_checkpoints, step_folder

log = logging.getLogger("megatron_agent")


class QueueFile:
    """`ahead/step_<n>` of the run's folder, beside the checkpoint of step n. Written aside and renamed; starts with a crc32 of
    the rest."""

    def __init__(self, parts: Stages) -> None:
        self._stream, self._folder = parts.data.train, parts.config.folder / "ahead"
        self._checkpoints = parts.config.folder / "checkpoints"

    def save(self, snapshot: Snapshot, stream: Mapping[str, Any]) -> None:
        """With the state that the tasks' stream had then; files of steps that can no longer be resumed go."""
        body = to_bytes(snapshot, dict(stream))
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / ".partial"
        try:
            with open(aside, "wb") as file:
                file.write(f"{zlib.crc32(body):08x}".encode() + body)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)  # a full disk: leave what there is to the checkpoint
            raise
        os.replace(aside, self._file(snapshot.updates))
        complete = complete_checkpoints(self._checkpoints)  # none: the first may be under way
        for old in self._folder.glob("step_*"):
            if complete and old.name < complete[0].name:
                old.unlink()

    def try_to_save(self, snapshot: Snapshot, stream: Mapping[str, Any]) -> None:
        """A queue that cannot be written is generated again: no reason to lose the checkpoint that follows."""
        try:
            self.save(snapshot, stream)
        except OSError as error:
            log.error("what was generated for later steps could not be kept in %s: %s", self._folder, error)

    def load(self, step: int) -> Snapshot | None:
        """Where there is one of that step; the stream then goes on from where it was. Raises CheckpointError when the file is
        not what was written."""
        file = self._file(step)
        if not file.is_file():
            return None
        data = file.read_bytes()
        if data[:8] != f"{zlib.crc32(data[8:]):08x}".encode():
            raise CheckpointError(f"{file}: damaged; remove it to generate again what it held")
        snapshot, stream = from_bytes(data[8:])
        assert self._stream is not None
        self._stream.load_state(stream)
        return snapshot

    def _file(self, step: int) -> Path:
        return self._folder / step_folder(self._checkpoints, step).name
