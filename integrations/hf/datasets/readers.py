"""Rows of local files, one at a time: .jsonl and .csv, gzipped or not, and .parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput

KINDS = (".jsonl", ".csv", ".parquet")
# Files up to this size are counted before the run, so that the time left can be told.
COUNTED_BYTES = 64 << 20
SAMPLE_BYTES = 1 << 16
PARQUET_BATCH = 256

Wanted = Callable[[int], bool]
Row = Any  # a dict of columns, or a `BadRow`


@dataclass(frozen=True)
class BadRow:
    """What stands in a dataset where a row should be; `reason` says what it is."""

    reason: str


def kind_of(path: Path) -> str:
    """The kind of a file, gzip apart.

    Raises:
        BadInput: no such file, or another kind.
    """
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in KINDS or (kind == ".parquet" and path.suffix == ".gz"):
        raise BadInput(f"{path}: not a kind of file that is read here; give .jsonl(.gz), .csv(.gz) or .parquet")
    return kind


def rows_of_file(path: Path, first: int, wanted: Wanted) -> Iterator[tuple[int, Row]]:
    """Yield `(number, row)` of the rows that are wanted; the file's first has number `first`.

    A line that holds no row comes as a `BadRow`.

    Raises:
        BadInput: the file cannot be read.
    """
    readers = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    with _readable(path):
        yield from readers[kind_of(path)](path, first, wanted)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error


def count_rows(path: Path) -> int | None:
    """Rows of a file; None for one that is too large to count.

    Raises:
        BadInput: it cannot be read.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path).metadata.num_rows
    if path.stat().st_size > COUNTED_BYTES:
        return None
    with _readable(path):
        return sum(1 for _ in _csv_rows(path, 0, lambda row: True)) if kind == ".csv" else _count_lines(path)


def fingerprint(path: Path) -> dict[str, Any]:
    """Tells a file from another at little cost: name, size, and a digest of its beginning and end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()[:16]}


def _open(path: Path, newline: str | None = None) -> Any:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8", newline=newline)


def _json_rows(path: Path, first: int, wanted: Wanted) -> Iterator[tuple[int, Row]]:
    number = first
    with _open(path) as lines:
        for place, line in enumerate(lines, 1):
            if line.isspace():
                continue
            if wanted(number):
                yield number, _parsed(line, place)
            number += 1


def _parsed(line: str, place: int) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"line {place} is not JSON: {error}")
    return row if isinstance(row, dict) else BadRow(f"line {place} is no JSON object but a {type(row).__name__}")


def _count_lines(path: Path) -> int:
    with _open(path) as lines:
        return sum(not line.isspace() for line in lines)


def _csv_rows(path: Path, first: int, wanted: Wanted) -> Iterator[tuple[int, Row]]:
    with _open(path, newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), first):
            if wanted(number):
                yield number, _whole(row)


def _whole(row: dict[Any, Any]) -> Row:
    """A row of a CSV file, unless it has more or fewer fields than the head."""
    if None in row:
        return BadRow(f"the row has {len(row[None])} fields more than the head")
    missing = [name for name, value in row.items() if value is None]
    return BadRow(f"the row ends before column {missing[0]!r}") if missing else row


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"{path}: needs pyarrow: pip install 'hf-paged[datasets]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error


def _parquet_rows(path: Path, first: int, wanted: Wanted) -> Iterator[tuple[int, Row]]:
    for batch in _parquet(path).iter_batches(batch_size=PARQUET_BATCH):
        places = [i for i in range(batch.num_rows) if wanted(first + i)]
        if places:
            rows = batch.to_pylist()
            yield from ((first + i, rows[i]) for i in places)
        first += batch.num_rows
