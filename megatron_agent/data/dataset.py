"""Parquet in DeepEyes' columns -> Tasks. Bad rows are named, skipped and counted; too many stop the run before it starts."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_agent import registry
from megatron_agent.data.images import IMAGE_MARKER, ImageStore, PixelLimits, content_items
from megatron_agent.errors import ConfigError, DataError
from megatron_agent.types import ImageRef, Message, Task

if TYPE_CHECKING:
    import pyarrow.parquet as pq

log = logging.getLogger("megatron_agent")

MAX_LOGGED_BAD_ROWS = 20
META_KEY = "extra_info"
ROWS_PER_READ = 16  # rows carry their pictures' bytes: a few tens of MB at a time


@dataclass
class DataConfig:
    """What to read. `image_key` empty: a dataset without pictures. `min_pixels`, `max_pixels` bound a shown prompt picture."""

    train_files: list[str] = field(default_factory=list)
    prompt_key: str = "prompt"
    image_key: str = "images"
    min_pixels: int = 3136
    max_pixels: int = 12845056
    shuffle: bool = True
    max_bad_rows: float = 0.01  # fraction of all rows above which the run refuses to start
    max_prompt_tokens: int = 0  # longer prompts are left out by whoever renders them; 0: none

    def __post_init__(self) -> None:
        self.pixel_limits()
        if not 0 <= self.max_bad_rows <= 1:
            raise ConfigError(f"data.max_bad_rows is {self.max_bad_rows}; it is a fraction: 0 to 1")
        if not self.prompt_key:
            raise ConfigError("data.prompt_key is empty; name the column that holds the chat messages")
        if self.max_prompt_tokens < 0:
            raise ConfigError(f"data.max_prompt_tokens is {self.max_prompt_tokens}; give 0 (no limit) or more")

    def pixel_limits(self) -> PixelLimits:
        return PixelLimits(self.min_pixels, self.max_pixels)


@dataclass
class DatasetReport:
    """What was read. `bad_rows` are "file: row N: why"; `by_env` and `by_source` count the rows that are used."""

    num_rows: int = 0
    num_bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    num_upscaled: int = 0  # pictures under 28 px on a side
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

    `meta_key` is the column whose struct becomes `Task.extra_info`; only the default one may be absent.
    Raises DataError: a file that is missing or no parquet, a column that is missing, an unknown tool environment, no rows,
    or more bad rows than `config.max_bad_rows` allows (the first five are named).
    """
    tasks: list[Task] = []
    report = DatasetReport()
    upscaled_before = store.num_upscaled
    reader = _RowReader(config, store, env_key, require_script, meta_key)
    paths = [Path(file) for file in files]
    num_named = Counter(path.stem for path in paths)
    for file in paths:
        label = file.stem if num_named[file.stem] == 1 else str(file.with_suffix(""))
        for row_number, row in _rows(file, reader.columns(), reader.required_columns()):
            report.num_rows += 1
            reader.check_env(file, row_number, row)
            try:
                tasks.append(reader.task(file, f"{label}:{row_number}", row))
            except DataError as error:
                report.bad_rows.append(f"{file}: row {row_number}: {error}")
    report.num_bad = len(report.bad_rows)
    report.num_upscaled = store.num_upscaled - upscaled_before
    report.by_env = dict(Counter(task.env_name for task in tasks))
    report.by_source = dict(Counter(task.data_source for task in tasks))
    _check(report, config.max_bad_rows, [str(file) for file in files])
    _log_bad_rows(report.bad_rows)
    return tasks, report


def drop_long_prompts(tasks: Sequence[Task], num_tokens: Callable[[Task], int], limit: int) -> tuple[list[Task], list[str]]:
    """Tasks whose prompt has at most `limit` tokens, and the names of the others with their counts."""
    counts = [num_tokens(task) for task in tasks]
    kept = [task for task, count in zip(tasks, counts, strict=True) if count <= limit]
    dropped = [f"{task.task_id} ({count} tokens)" for task, count in zip(tasks, counts, strict=True) if count > limit]
    return kept, dropped


def _log_bad_rows(bad_rows: list[str]) -> None:
    for name in bad_rows[:MAX_LOGGED_BAD_ROWS]:
        log.warning("skipped %s", name)
    if len(bad_rows) > MAX_LOGGED_BAD_ROWS:
        log.warning("... and %d more", len(bad_rows) - MAX_LOGGED_BAD_ROWS)


def _check(report: DatasetReport, max_bad_rows: float, files: list[str]) -> None:
    if not report.num_rows:
        raise DataError(f"no rows in {', '.join(files) or 'no files: name at least one'}")
    if report.num_bad > max_bad_rows * report.num_rows or report.num_bad == report.num_rows:
        first = "\n  ".join(report.bad_rows[:5])
        raise DataError(
            f"{report.num_bad} of {report.num_rows} rows are bad, data.max_bad_rows={max_bad_rows} allows "
            f"{int(max_bad_rows * report.num_rows)}. The first of them:\n  {first}"
        )


def _rows(file: Path, columns: list[str], required: list[str]) -> Iterator[tuple[int, dict]]:
    """(row number from 0, row as plain Python) in file order, a few rows in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise DataError(f"{file}: no such file")
    row_number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            present = _check_columns(file, parquet, columns, required)
            for batch in parquet.iter_batches(ROWS_PER_READ, columns=present, use_threads=False):
                for row in batch.to_pylist():
                    yield row_number, row
                    row_number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable as parquet (near row {row_number}): {error}") from error


def _check_columns(file: Path, parquet: pq.ParquetFile, columns: list[str], required: list[str]) -> list[str]:
    present = parquet.schema_arrow.names
    missing = [name for name in required if name not in present]
    if missing:
        raise DataError(f"{file}: missing column {', '.join(missing)}; its columns are {', '.join(present)}")
    return [name for name in columns if name in present]


class _RowReader:
    """One row -> one Task. Its methods raise DataError with the reason alone; the caller adds file and row."""

    def __init__(self, config: DataConfig, store: ImageStore, env_key: str, require_script: bool, meta_key: str) -> None:
        self.config, self.store, self.env_key, self.require_script = config, store, env_key, require_script
        self.meta_key = meta_key
        self.limits = config.pixel_limits()

    def required_columns(self) -> list[str]:
        names = ["data_source", self.config.prompt_key, self.config.image_key, self.env_key, "reward_model"]
        if self.meta_key != META_KEY:
            names.append(self.meta_key)
        return [name for name in [*names, *(["script"] if self.require_script else [])] if name]

    def columns(self) -> list[str]:
        return list(dict.fromkeys([*self.required_columns(), *([self.meta_key] if self.meta_key else []), "script"]))

    def check_env(self, file: Path, row_number: int, row: dict) -> None:
        """An unknown tool is a mistake of the whole run, not of a row: it stops at once."""
        name = row[self.env_key]
        if name:
            try:
                registry.resolve("envs", str(name))
            except ConfigError as error:
                raise DataError(f"{file}: row {row_number}: column {self.env_key}: {error}") from error

    def task(self, file: Path, task_id: str, row: dict) -> Task:
        pictures = (row.get(self.config.image_key) or []) if self.config.image_key else []
        if not isinstance(pictures, list):
            raise DataError(f"the column {self.config.image_key} must hold a list of pictures, not a {type(pictures).__name__}")
        messages = _messages(row[self.config.prompt_key], len(pictures))
        ground_truth = _ground_truth(row["reward_model"])
        extra_info = row.get(self.meta_key) or {}
        if not isinstance(extra_info, dict):
            raise DataError(f"{self.meta_key} is a {type(extra_info).__name__}, not a mapping")
        return Task(
            task_id=task_id,
            data_source=str(row["data_source"] or ""),
            messages=messages,
            images=tuple(self._image(picture, index, file.parent) for index, picture in enumerate(pictures)),
            env_name=str(row[self.env_key] or ""),
            ground_truth=ground_truth,
            question=str(extra_info.get("question") or _last_user_text(messages)),
            extra_info=extra_info,
            script=self._script(row),
        )

    def _image(self, picture: object, index: int, folder: Path) -> ImageRef:
        try:
            return self.store.put(_picture_bytes(picture, folder), self.limits)
        except DataError as error:
            raise DataError(f"picture {index}: {error}") from error

    def _script(self, row: dict) -> tuple[str, ...]:
        script = row.get("script") or []
        if self.require_script and not script:
            raise DataError("the script is empty; a supervised row needs the assistant's turns")
        if not all(isinstance(turn, str) for turn in script):
            raise DataError("the script must be a list of texts")
        return tuple(script)


def _picture_bytes(picture: object, folder: Path) -> bytes:
    if isinstance(picture, bytes):
        return picture
    path = picture
    if isinstance(picture, dict):
        if picture.get("bytes") and isinstance(picture["bytes"], bytes):
            return picture["bytes"]
        path = picture.get("path")
    if not path or not isinstance(path, str):
        raise DataError("it has neither bytes nor a path")
    try:
        return (folder / path).read_bytes()  # an absolute path replaces the folder
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path!r} (looked for {folder / path}): {error}") from error


def _messages(prompt: object, num_pictures: int) -> tuple[Message, ...]:
    """Chat messages in which the user's `<image>` markers are items; pictures without any marker come first."""
    if not isinstance(prompt, list) or not prompt:
        raise DataError("the prompt is empty")
    for message in prompt:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(f"the prompt must be a list of messages with a role and a text as content, got {message!r:.100}")
    user = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not user or not any(prompt[index]["content"].replace(IMAGE_MARKER, "").strip() for index in user):
        raise DataError("the prompt has no text of the user")
    num_markers = sum(prompt[index]["content"].count(IMAGE_MARKER) for index in user)
    if num_markers not in (0, num_pictures):
        raise DataError(f"{num_markers} {IMAGE_MARKER} markers in the user's text, {num_pictures} pictures in the row")
    first = IMAGE_MARKER * (num_pictures - num_markers)
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        text = (first if index == user[0] else "") + message["content"]
        with_pictures = message["role"] == "user" and IMAGE_MARKER in text
        messages.append({"role": message["role"], "content": content_items(text) if with_pictures else text})
    return tuple(messages)


def _ground_truth(reward_model: object) -> str:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(truth, (int, float)):
        truth = str(truth)
    if not isinstance(truth, str) or not truth.strip():
        raise DataError(f"no ground truth: reward_model.ground_truth is {truth!r:.80}")
    return truth


def _last_user_text(messages: tuple[Message, ...]) -> str:
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    if isinstance(content, list):
        content = "".join(item.get("text", "") for item in content)
    return str(content).strip()


class TaskStream:
    """Tasks without end, in an order that the seed fixes: every epoch is a permutation of its own. Resumes exactly.

    The order comes from Python's `random`, whose shuffle is stable over versions. Raises DataError: no tasks.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, shuffle: bool = True) -> None:
        if not tasks:
            raise DataError("a stream needs at least one task")
        self._tasks, self._seed, self._shuffle = tasks, seed, shuffle
        self._fingerprint = hashlib.sha256("\n".join(task.task_id for task in tasks).encode()).hexdigest()[:16]
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        return self._epoch

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks; may run over into following epochs."""
        batch: list[Task] = []
        while len(batch) < n:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            taken = self._order[self._position : self._position + n - len(batch)]
            self._position += len(taken)
            batch += [self._tasks[index] for index in taken]
        return batch

    def state(self) -> dict[str, int | str | bool]:
        """Plain values, for a checkpoint."""
        return {
            "epoch": self._epoch, "position": self._position, "seed": self._seed, "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
        }  # fmt: skip

    def load_state(self, state: dict[str, int | str | bool]) -> None:
        """Go on where `state` was taken. Raises DataError where the tasks, the seed or the shuffling have changed."""
        own = self.state()
        changed = [f"{name} was {state.get(name)!r}, is {own[name]!r}" for name in ("fingerprint", "seed", "shuffle")
                   if state.get(name) != own[name]]  # fmt: skip
        if changed:
            raise DataError(f"the data order cannot be resumed: {'; '.join(changed)}. Use the same files, rows and seed")
        self._start_epoch(int(state["epoch"]))
        self._position = int(state["position"])

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = list(range(len(self._tasks)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
