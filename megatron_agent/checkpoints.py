"""Checkpoints of a run, as the driver sees them: started at a step boundary, completed while training goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_agent.errors import CheckpointError, ConfigError
from megatron_agent.training.checkpoint import begin_checkpoint, complete_checkpoints, drop_old, finish_checkpoint, step_folder
from megatron_agent.training.checksums import write_checksums
from megatron_agent.training.learner import model_folders

if TYPE_CHECKING:
    from megatron_agent.config import RunConfig

log = logging.getLogger("megatron_agent")


class Saved(Protocol):
    """What can be saved: the policy's ranks, or a learner with all its models."""

    async def save(self, folder: Path) -> None: ...

    async def check_save(self) -> None: ...

    async def finish_save(self) -> None: ...


BEST_FILE, EXPORT_FOLDER = "best.json", "hf_model"
POLL_S = 0.05


class Checkpoints:
    """consumes: the run's state and what the trainer's ranks write. waits for: the save before, one is under way at a time.
    unblocked by: the slowest rank's disk. produces: complete folders, and `best.json`, which names the best one."""

    def __init__(self, config: RunConfig) -> None:
        self.root, self.section = config.folder / "checkpoints", config.checkpoint
        self._start = config.folder / "start"
        self.model_path, self.num_ranks = Path(config.model.path), config.training.layout.world_size
        self._step: int | None = None  # of the last save
        self._pending: asyncio.Task[None] | None = None
        self._lock = threading.Lock()  # of best.json and deletions
        self._candidate: dict[str, Any] = {}  # the best one, until it is complete

    async def save(self, learner: Saved, state: dict[str, Any], wait: bool = False) -> None:
        """Save step `state["step"]` unless it is; with `checkpoint.asynchronous` and without `wait` only the ranks' copies
        are waited for. Raises CheckpointError, also of the save before."""
        step = state["step"]
        if step != self._step and step_folder(self.root, step) not in complete_checkpoints(self.root)[-1:]:
            await self.finish(learner)
            state = json.loads(json.dumps(state))  # as it is now
            aside = await asyncio.to_thread(begin_checkpoint, self.root, step)
            await learner.save(aside)
            self._step, self._pending = step, asyncio.create_task(self._complete(aside, state))
        if wait or not self.section.asynchronous:
            await self.finish(learner)

    async def check(self, learner: Saved) -> None:
        """At a step boundary: raises CheckpointError if the save under way has failed."""
        if self._pending is not None:
            try:
                await learner.check_save()
            except CheckpointError:
                self._give_up()
                raise
            if self._pending.done():
                await self.finish(learner)

    async def finish(self, learner: Saved) -> None:
        """Until no save is under way. Raises CheckpointError if it failed."""
        if self._pending is not None:
            try:
                await learner.finish_save()
                await self._pending
            except BaseException:  # cancelled or failed alike: what is half written must go; it goes on to the caller
                self._give_up()
                raise
            self._pending = None

    def _give_up(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        for aside in self.root.glob(".step_*.partial"):
            shutil.rmtree(aside, ignore_errors=True)

    async def _complete(self, aside: Path, state: dict[str, Any]) -> None:
        for folder in model_folders(aside):
            while sum(1 for _ in folder.glob(".part_?????")) < self.num_ranks:
                await asyncio.sleep(POLL_S)
        try:
            await asyncio.to_thread(self._complete_files, aside, state)
        except (OSError, RuntimeError) as error:  # torch raises the second in place of the first
            raise CheckpointError(f"{aside}: the checkpoint could not be written: {error}") from error

    def _complete_files(self, aside: Path, state: dict[str, Any]) -> None:
        from megatron_agent.training.hf_export import HF_FOLDER, LAYOUT_FILE, HfLayout, carry, export_hf
        from megatron_agent.training.snapshot import assemble

        for folder in model_folders(aside)[1:]:
            write_checksums(folder, assemble(folder, self.num_ranks))
        tensors = assemble(aside, self.num_ranks)
        carry(self.model_path, aside / HF_FOLDER)
        HfLayout.of_folder(self.model_path).write(aside / HF_FOLDER / LAYOUT_FILE)
        folder = finish_checkpoint(self.root, state["step"], state, tensors)
        self._tidy()
        if self.section.export_hf:
            export_hf(folder, folder / EXPORT_FOLDER, workers=1)
        log.info("checkpoint %s", folder)

    @property
    def start(self) -> Path | None:
        """The weights that RL began with after a warm start; None: those of model.path."""
        return self._start if self._start.is_dir() else None

    async def save_start(self, actor: Saved) -> None:
        """Keep the policy's weights as they are now. Raises CheckpointError."""
        from megatron_agent.training.snapshot import assemble

        aside = self._start.with_name(".start.partial")
        for stale in (aside, self._start):
            shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir(parents=True)
        await actor.save(aside)
        await actor.finish_save()
        write_checksums(aside, await asyncio.to_thread(assemble, aside, self.num_ranks))
        os.replace(aside, self._start)

    def best(self) -> dict[str, Any]:
        """`best.json`: step, folder, metric and value of the best complete checkpoint; empty when there is none."""
        try:
            best = json.loads((self.root / BEST_FILE).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        is_ours = best.get("metric") == self.section.keep_best and (self.root / best["folder"]).is_dir()
        return best if is_ours else {}

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether `checkpoint.keep_best` is there and higher than ever. Raises ConfigError naming what there is."""
        name = self.section.keep_best
        if not name:
            return False
        if name not in metrics:
            there = ", ".join(sorted(metrics))
            raise ConfigError(f"checkpoint.keep_best={name!r} is no metric of the evaluation; there are: {there}")
        known = self._candidate or self.best()
        return not known or metrics[name] > known["value"]

    async def mark_best(self, step: int, metrics: dict[str, float]) -> None:
        """The checkpoint of `step`, complete or under way, is the best; it is kept until a better one is complete."""
        name = self.section.keep_best
        folder = step_folder(self.root, step).name
        self._candidate = {"step": step, "folder": folder, "metric": name, "value": metrics[name]}
        await asyncio.to_thread(self._tidy)

    def _tidy(self) -> None:
        with self._lock:
            candidate = self._candidate
            if candidate and self.root / candidate["folder"] in complete_checkpoints(self.root):
                aside = self.root / f".{BEST_FILE}"
                aside.write_text(json.dumps(candidate))
                os.replace(aside, self.root / BEST_FILE)
                self._candidate = {}
            drop_old(self.root, self.section.keep, self.best().get("folder", ""))
