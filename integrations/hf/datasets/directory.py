"""The directory of a run: locked, resumed, written to."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.manifest import NAME, settle, write_json
from hf_paged.integrations.datasets.parts import (
    FORMATS,
    Done,
    JsonlPart,
    ParquetParts,
    mend,
    parts_of,
    rows_of_part,
    scan,
)
from hf_paged.integrations.datasets.shard import Shard


class OutputDirectory:
    """Where the rows of a run go, and which are there already.

    Rank 0 calls `prepare`, then every rank `open`; rows may be written from then on. Use it as a context, or `close`.

    Attributes:
        done: rows that any run has written here.

    Raises:
        BadInput: on a format, a number of rows or a path that cannot be used.
    """

    def __init__(
        self, path: str | Path, form: str = "jsonl", shard_rows: int = 1000, shard: Shard | None = None
    ) -> None:
        if form not in FORMATS:
            raise BadInput(f"format={form!r}: must be one of {', '.join(FORMATS)}")
        if form == "parquet" and find_spec("pyarrow") is None:
            raise BadInput("format='parquet' needs pyarrow: pip install 'hf-paged[datasets]'")
        if shard_rows < 1:
            raise BadInput(f"shard_rows={shard_rows}: must be at least 1")
        self.path, self.form, self.shard_rows = Path(path).expanduser(), form, shard_rows
        self.shard = shard or Shard()
        self.done = Done()
        self._lock: Any = None
        self._part: JsonlPart | ParquetParts | None = None

    def prepare(self, manifest: dict[str, Any]) -> bool:
        """Make the directory or take over what a run has left there. For rank 0.

        Returns:
            whether there is a run to be resumed.
        Raises:
            BadInput: another run uses it, it was begun with other settings (see `settle`), it cannot be written to,
                or it holds files of somebody else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._refuse_others()
            self._refuse_foreign()
            resumed = settle(self.path, manifest)
            mend(self.path, self.form)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be used for output: {error}") from error
        return resumed

    def open(self) -> None:
        """Find finished rows, and open this rank's part."""
        self._acquire()
        self.done = scan(self.path, self.form)
        rank = self.shard.rank
        jsonl = self.form == "jsonl"
        self._part = JsonlPart(self.path, rank) if jsonl else ParquetParts(self.path, rank, self.shard_rows)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, which must be new.

        Raises:
            OSError: they cannot be written, on a full disk above all; what was written before stays valid.
        """
        for row in rows:
            self.done.add(row["row"], row["error"] is not None)
        try:
            self._part.write(rows)
        except OSError as error:
            raise named(error, self.path) from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`; of several ranks, `summary-RRRRR.json` each."""
        rank = "" if self.shard.world == 1 else f"-{self.shard.rank:05d}"
        write_json(self.path / f"summary{rank}.json", summary)

    def close(self) -> None:
        """Write what is kept, and let others use the directory.

        Raises:
            OSError: as `write`.
        """
        part, self._part = self._part, None
        try:
            if part is not None:
                part.close()
        except OSError as error:
            raise named(error, self.path) from error
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # what went wrong before is what counts
                raise

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        if self._lock is None:
            lock = FileLock(self.path / f".lock-{self.shard.rank:05d}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise BadInput(f"{self.path} is in use by another run: wait for it, or give another --out") from None
            self._lock = lock

    def _refuse_others(self) -> None:
        """No other rank of another run may be alive."""
        from filelock import FileLock, Timeout

        for path in sorted(self.path.glob(".lock-*")):
            if path.name == f".lock-{self.shard.rank:05d}":
                continue
            try:
                FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                raise BadInput(
                    f"{self.path} is in use by another run ({path.name}): wait, or give another --out"
                ) from None

    def _refuse_foreign(self) -> None:
        """Files that a reader of the directory would take for ours."""
        if (self.path / NAME).exists():
            return
        for form in FORMATS:
            for path in sorted(self.path.glob(f"*.{form}")):
                raise BadInput(f"{self.path} holds {path.name} and no {NAME}: give an empty directory")


def named(error: OSError, path: Path) -> OSError:
    """The same error, saying what to do about it."""
    if error.errno == errno.ENOSPC:
        what = (
            f"the disk is full: {path} keeps all rows written so far; free some space and give the same command again"
        )
    else:
        what = f"{path} cannot be written to ({error.strerror}); it keeps all rows written so far"
    return OSError(error.errno, what)


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run's directory, part by part: in the order in which they ended.

    Raises:
        BadInput: it holds no run.
    """
    folder = Path(path).expanduser()
    if not (folder / NAME).exists():
        raise BadInput(f"{folder} holds no run: no {NAME}")
    for form in FORMATS:
        for part in parts_of(folder, form):
            yield from rows_of_part(part)
