"""Dataset files -> rows, a few in memory at a time. The kind of a file follows from its suffix: .parquet or .jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_agent.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROWS_PER_READ = 16  # rows carry their pictures' bytes: a few tens of MB at a time
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """Row `number` (from 0) of a file, or, with `error`, why there is none. `place` names it to a person."""

    number: int
    place: str
    values: dict[str, object]
    error: str = ""


def read_rows(file: Path, columns: Sequence[str], required: Sequence[str]) -> Iterator[Row]:
    """The rows of `file` in order, with the `columns` that it has.

    Raises DataError: no such file, another kind of file, unreadable, or a parquet file without a `required` column. A
    line of a .jsonl file that is no JSON object, or lacks a required key, is a Row with an error.
    """
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    if file.suffix not in readers:
        raise DataError(f"{file}: unknown kind of file; names must end in {' or '.join(readers)}")
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    return readers[file.suffix](file, columns, required)


def _parquet_rows(file: Path, columns: Sequence[str], required: Sequence[str]) -> Iterator[Row]:
    """A buffered reader holds a page of every column, not a row group. Arrow writes pages of up to 1,024 pictures, and
    while one is opened it is there twice, packed and plain: more than that is not taken, and it is given back."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            present = _check_columns(file, parquet, columns, required)
            for batch in parquet.iter_batches(ROWS_PER_READ, columns=present, use_threads=False):
                for values in batch.to_pylist():
                    yield Row(number, f"row {number}", values)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable as parquet (near row {number}): {error}") from error
    finally:
        pa.default_memory_pool().release_unused()


def _check_columns(file: Path, parquet: pq.ParquetFile, columns: Sequence[str], required: Sequence[str]) -> list[str]:
    present = parquet.schema_arrow.names
    if missing := [name for name in required if name not in present]:
        raise DataError(f"{file}: missing column {', '.join(missing)}; its columns are {', '.join(present)}")
    return [name for name in columns if name in present]


def _jsonl_rows(file: Path, columns: Sequence[str], required: Sequence[str]) -> Iterator[Row]:
    try:
        with file.open("rb") as lines:
            filled = (line for line in enumerate(lines, start=1) if line[1].strip())
            for number, (line_number, line) in enumerate(filled):
                yield Row(number, f"line {line_number}", *_json_row(line, columns, required))
    except OSError as error:
        raise DataError(f"{file}: not readable: {error}") from error


def _json_row(line: bytes, columns: Sequence[str], required: Sequence[str]) -> tuple[dict[str, object], str]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"not valid JSON: {error}"
    if not isinstance(values, dict):
        return {}, f"a {type(values).__name__}, not a JSON object"
    if missing := [name for name in required if name not in values]:
        return {}, f"missing key {', '.join(missing)}; its keys are {', '.join(values)}"
    return {name: values[name] for name in columns if name in values}, ""
