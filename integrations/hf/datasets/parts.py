"""Part files: rows appended as JSON lines, or in shards of Parquet; torn ends cut, finished rows found."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput

FORMATS = ("jsonl", "parquet")
LINE = re.compile(rb'\{"row": (\d+), .*\}\n', re.DOTALL)
GOOD_END = b'"error": null}\n'
SYNC_SECONDS = 10.0
TEMPORARY = ".tmp"


class Done:
    """Numbers of rows that are written: a byte a row."""

    def __init__(self) -> None:
        self._flags = bytearray()
        self.count = 0

    def __contains__(self, row: int) -> bool:
        return row < len(self._flags) and bool(self._flags[row])

    @property
    def end(self) -> int:
        """No row from this one on is written."""
        return len(self._flags)

    def failed(self, row: int) -> bool:
        """Whether a row is written with an error."""
        return row in self and self._flags[row] == 2

    def add(self, row: int, failed: bool) -> None:
        """Note a row.

        Raises:
            ValueError: it was noted before.
        """
        if row in self:
            raise ValueError(f"row {row} is written twice")
        if row >= len(self._flags):
            self._flags.extend(bytes(max(row + 1 - len(self._flags), len(self._flags))))
        self._flags[row] = 2 if failed else 1
        self.count += 1


def parts_of(folder: Path, form: str) -> list[Path]:
    """Part files in a folder, in order of their names."""
    return sorted(folder.glob(f"part-*.{form}"))


def mend(folder: Path, form: str) -> None:
    """Cut what a killed run left unfinished: the last line of a file, a shard that has no name yet.

    Raises:
        BadInput: a file is damaged in another way.
    """
    for path in folder.glob(f"part-*{TEMPORARY}"):
        path.unlink()
    if form == "jsonl":
        for path in parts_of(folder, form):
            good = 0
            for end, line in _lines(path):
                if LINE.fullmatch(line) is None:
                    break
                good = end
            if good < path.stat().st_size:
                os.truncate(path, _torn(path, good))


def _torn(path: Path, good: int) -> int:
    """Where to cut a file whose lines are whole up to `good`.

    Raises:
        BadInput: more than its last line is damaged.
    """
    with open(path, "rb") as file:
        file.seek(good)
        rest = file.read()
    if rest.find(b"\n") not in (-1, len(rest) - 1):
        raise BadInput(f"{path}: the line at byte {good} is damaged, and others follow it: mend or remove it")
    return good


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with the place where it ends."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            yield end, line


def scan(folder: Path, form: str) -> Done:
    """Which rows are written, in any part file. A line that another process is writing is left out.

    Raises:
        BadInput: a file is damaged, or a row is there twice.
    """
    done = Done()
    for path in parts_of(folder, form):
        try:
            for row, failed in _written(path, form):
                done.add(row, failed)
        except ValueError as error:
            raise BadInput(f"{path}: {error}") from error
    return done


def _written(path: Path, form: str) -> Iterator[tuple[int, bool]]:
    if form == "jsonl":
        for _, line in _lines(path):
            found = LINE.fullmatch(line)
            if found is not None:
                yield int(found[1]), not line.endswith(GOOD_END)
        return
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["row", "error"])
    yield from zip(table["row"].to_pylist(), (e is not None for e in table["error"].to_pylist()), strict=True)


def rows_of_part(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a part file."""
    if path.suffix == ".jsonl":
        yield from (json.loads(line) for _, line in _lines(path))
        return
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def line_of(row: dict[str, Any]) -> bytes:
    """A row as a line; text that is no Unicode (lone surrogates) is escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


class JsonlPart:
    """One file of a rank, appended to. A line reaches the kernel before `write` returns, the disk soon after."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"part-{rank:05d}.jsonl"
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 closed by `close`
        self._good, self._synced = self._file.tell(), time.monotonic()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows: all of them or, after an exception, none.

        Raises:
            OSError: they cannot be written.
        """
        data = memoryview(b"".join(map(line_of, rows)))
        try:
            at = 0
            while at < len(data):
                at += self._file.write(data[at:])
        except BaseException:
            os.truncate(self.path, self._good)
            raise
        self._good += len(data)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class ParquetParts:
    """Shards of a rank, each of so many rows, written under another name first."""

    def __init__(self, folder: Path, rank: int, shard_rows: int) -> None:
        self.folder, self.rank, self.shard_rows = folder, rank, shard_rows
        numbers = [int(path.stem.split("-")[2]) for path in folder.glob(f"part-{rank:05d}-*.parquet")]
        self.number = max(numbers, default=-1) + 1
        self._rows: list[dict[str, Any]] = []

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows until they fill a shard; what is not in a shard yet a killed run makes again.

        Raises:
            OSError: a shard cannot be written; its rows are kept for another try.
        """
        self._rows.extend(rows)
        while len(self._rows) >= self.shard_rows:
            self._shard(self.shard_rows)

    def close(self) -> None:
        if self._rows:
            self._shard(len(self._rows))

    def _shard(self, count: int) -> None:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / f"part-{self.rank:05d}-{self.number:05d}.parquet"
        unfinished = path.with_suffix(f".parquet{TEMPORARY}")
        try:
            table = pyarrow.Table.from_pylist([_encodable(row) for row in self._rows[:count]], schema=_schema())
            with open(unfinished, "wb") as file:
                pyarrow.parquet.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self.number += 1
        del self._rows[:count]


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """The row with lone surrogates, which are no Unicode, as question marks."""
    return {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()}


def _schema() -> Any:
    import pyarrow as pa

    kinds = {"row": pa.int64(), "token_ids": pa.list_(pa.int32()), "prompt_tokens": pa.int32(), "truncated": pa.int32()}
    names = ("row", "prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "truncated", "error")
    return pa.schema([(name, kinds.get(name, pa.string())) for name in names])
