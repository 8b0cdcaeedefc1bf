"""Files in DeepEyes' columns -> Tasks. Bad rows are named, skipped and counted; too many stop the run before it starts."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron_agent import registry
from megatron_agent.data.images import PATCH_SIDE_PX, ImageStore, PixelLimits
from megatron_agent.data.rows import Row, read_rows
from megatron_agent.data.stream import MixPart, TaskMix, TaskStream, check_mix
from megatron_agent.data.tasks import META_KEY, TaskReader
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import Task

log = logging.getLogger("megatron_agent")
T = TypeVar("T")
R = TypeVar("R")

MAX_LOGGED_BAD_ROWS = 20
MAX_DEFAULT_WORKERS = 16
AHEAD_PER_WORKER = 4  # rows that wait for their turn: each carries its pictures' bytes


@dataclass
class DataConfig:
    """What to read. `image_key` empty: a dataset without pictures. `min_pixels`, `max_pixels` bound a shown prompt picture.

    `train_files` are shuffled together, every row once an epoch; `mix` instead gives groups of files weights and steps.
    With `curriculum` the files of `train_files`, or the parts of `mix`, come one after another, each for its `num_epochs`
    (0: one), the last without end.
    """

    train_files: list[str] = field(default_factory=list)
    mix: list[MixPart] = field(default_factory=list)
    curriculum: bool = False
    prompt_key: str = "prompt"
    image_key: str = "images"
    min_pixels: int = 3136
    max_pixels: int = 12845056
    shuffle: bool = True
    max_bad_rows: float = 0.01  # fraction of all rows above which the run refuses to start
    max_prompt_tokens: int = 0  # longer prompts are left out by whoever renders them; 0: none
    num_workers: int = 0  # threads that check pictures and count tokens at the start; 0: one a core, at most 16
    image_dir: str = ""  # where this node keeps pictures; empty: below output_dir, for one node or a folder that all share
    image_cache_mib: int = 512  # decoded pictures that a process keeps, of originals and of shown ones each

    def __post_init__(self) -> None:
        self.pixel_limits()
        if not 0 <= self.max_bad_rows <= 1:
            raise ConfigError(f"data.max_bad_rows is {self.max_bad_rows}; it is a fraction: 0 to 1")
        if not self.prompt_key:
            raise ConfigError("data.prompt_key is empty; name the column that holds the chat messages")
        for name in ("max_prompt_tokens", "num_workers", "image_cache_mib"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; give 0 or more")
        if self.mix and self.train_files:
            raise ConfigError("data.train_files and data.mix are both given; a file belongs to one of them")
        if twice := [file for file, count in Counter(self.train_files).items() if count > 1]:
            raise ConfigError(f"data.train_files names {twice[0]} twice; data.mix gives files a weight")
        check_mix(self.parts(), self.curriculum)

    def pixel_limits(self) -> PixelLimits:
        return PixelLimits(self.min_pixels, self.max_pixels)

    def parts(self) -> list[MixPart]:
        """What the stream of training tasks draws from: one part for all files unless they are mixed or ordered."""
        if self.mix or not self.train_files:
            return self.mix
        if self.curriculum:
            return [MixPart([file]) for file in self.train_files]
        return [MixPart(self.train_files)]

    def all_train_files(self) -> list[str]:
        """Each file once, in the order in which they are named."""
        return list(dict.fromkeys(file for part in self.parts() for file in part.files))


@dataclass
class DatasetReport:
    """What was read. `bad_rows` are "file: row N: why"; `by_env` and `by_source` count the rows that are used."""

    num_rows: int = 0
    num_bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    num_upscaled: int = 0  # pictures of used rows that are under 28 px on a side
    by_env: dict[str, int] = field(default_factory=dict)
    by_source: dict[str, int] = field(default_factory=dict)


def read_tasks(
    files: Sequence[str | Path],
    config: DataConfig,
    store: ImageStore,
    env_key: str = "env_name",
    require_script: bool = False,
    meta_key: str = META_KEY,
) -> tuple[list[Task], DatasetReport]:
    """Read every row of `files` and put their pictures into `store`. Skipped rows are logged by name.

    Tasks come in the order of files and rows, however many workers there are; `task_id` is "label:row" (`file_labels`).
    `meta_key` is the column whose struct becomes `Task.extra_info`; only the default one may be absent.
    Raises DataError: a file that is missing or cannot be read, a column that is missing, an unknown tool environment, no
    rows, or more bad rows than `config.max_bad_rows` allows (the first five are named).
    """
    tasks, report = scan(files, config, store, env_key, require_script, meta_key)
    check_report(report, config.max_bad_rows, [str(file) for file in files])
    _log_bad_rows(report.bad_rows)
    store.save_sizes()
    return tasks, report


def scan(
    files: Sequence[str | Path],
    config: DataConfig,
    store: ImageStore,
    env_key: str = "env_name",
    require_script: bool = False,
    meta_key: str = META_KEY,
) -> tuple[list[Task], DatasetReport]:
    """`read_tasks` for whoever judges the report himself (`check_report`): however many rows are bad."""
    paths = [Path(file) for file in files]
    reader = TaskReader(config, store, env_key, require_script, meta_key)
    rows_of = [read_rows(path, reader.columns(), reader.required_columns()) for path in paths]  # a missing file is found now
    store.load_sizes()
    tasks: list[Task] = []
    report = DatasetReport()
    for path, label, rows in zip(paths, file_labels(paths), rows_of, strict=True):
        for row, task in in_order(partial(_read_row, reader, path.parent, label), rows, config.num_workers):
            report.num_rows += 1
            _check_env(row, env_key, path)
            if isinstance(task, Task):
                tasks.append(task)
            else:
                report.bad_rows.append(f"{path}: {row.place}: {task}")
    report.num_bad = len(report.bad_rows)
    sizes_px = (store.original_size_px(ref.source) for task in tasks for ref in task.images)
    report.num_upscaled = sum(min(size_px) < PATCH_SIDE_PX for size_px in sizes_px)
    report.by_env = dict(Counter(task.env_name for task in tasks))
    report.by_source = dict(Counter(task.data_source for task in tasks))
    return tasks, report


def check_report(report: DatasetReport, max_bad_rows: float, files: Sequence[str]) -> None:
    """Raises DataError: no rows, none that is good, or more bad ones than the fraction `max_bad_rows`."""
    if not report.num_rows:
        raise DataError(f"no rows in {', '.join(files) or 'no files: name at least one'}")
    if report.num_bad > max_bad_rows * report.num_rows or report.num_bad == report.num_rows:
        first = "\n  ".join(report.bad_rows[:5])
        raise DataError(
            f"{report.num_bad} of {report.num_rows} rows are bad, data.max_bad_rows={max_bad_rows} allows "
            f"{int(max_bad_rows * report.num_rows)}. The first of them:\n  {first}"
        )


def file_labels(files: Sequence[Path]) -> list[str]:
    """A short name of each file: its stem, or as much of its path as tells it from the others."""
    names = [(file.stem, str(file.with_suffix("")), str(file)) for file in files]
    counts = Counter(name for of_file in names for name in set(of_file))
    return [next((name for name in of_file if counts[name] == 1), of_file[-1]) for of_file in names]


def training_stream(tasks: Sequence[Task], config: DataConfig, seed: int, prompts_per_step: int) -> TaskStream | TaskMix:
    """The tasks of `config.all_train_files()`, in the order in which a run draws them. Raises DataError: a part without any."""
    parts, files = config.parts(), config.all_train_files()
    if len(parts) <= 1:
        return TaskStream(tasks, seed, config.shuffle)
    of_label: dict[str, list[Task]] = {}
    for task in tasks:
        of_label.setdefault(task.task_id.rpartition(":")[0], []).append(task)
    of_file = dict(zip(files, map(of_label.get, file_labels([Path(file) for file in files])), strict=True))
    of_parts = [[task for file in part.files for task in of_file[file] or ()] for part in parts]
    return TaskMix(parts, of_parts, seed, prompts_per_step, config.shuffle, config.curriculum)


def drop_long_prompts(
    tasks: Sequence[Task], num_tokens: Callable[[Task], int], limit: int, num_workers: int = 0
) -> tuple[list[Task], list[str]]:
    """Tasks whose prompt has at most `limit` tokens, and the names of the others with their counts."""
    counts = list(in_order(num_tokens, tasks, num_workers))
    kept = [task for task, count in zip(tasks, counts, strict=True) if count <= limit]
    dropped = [f"{task.task_id} ({count} tokens)" for task, count in zip(tasks, counts, strict=True) if count > limit]
    return kept, dropped


def in_order(work: Callable[[T], R], items: Iterable[T], num_workers: int = 0) -> Iterator[R]:
    """`work` of every item, on `num_workers` threads (0: one a core, at most 16), in the order of the items.

    Only a few items are under way at a time. Decoding and tokenising run outside Python's lock, so threads are enough.
    """
    num_workers = num_workers or min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="data") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > AHEAD_PER_WORKER * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read_row(reader: TaskReader, folder: Path, label: str, row: Row) -> tuple[Row, Task | str]:
    """The task, or why there is none."""
    try:
        return row, row.error or reader.task(row.values, f"{label}:{row.number}", folder)
    except DataError as error:
        return row, str(error)


def _check_env(row: Row, env_key: str, file: Path) -> None:
    """An unknown tool is a mistake of the whole run, not of a row: it stops at once."""
    if name := row.values.get(env_key):
        try:
            registry.resolve("envs", str(name))
        except ConfigError as error:
            raise DataError(f"{file}: {row.place}: column {env_key}: {error}") from error


def _log_bad_rows(bad_rows: list[str]) -> None:
    for name in bad_rows[:MAX_LOGGED_BAD_ROWS]:
        log.warning("skipped %s", name)
    if len(bad_rows) > MAX_LOGGED_BAD_ROWS:
        log.warning("... and %d more", len(bad_rows) - MAX_LOGGED_BAD_ROWS)
