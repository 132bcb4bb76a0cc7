"""Rows of whatever a dataset may be, numbered, one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.readers import (
    KINDS,
    BadRow,
    Row,
    Wanted,
    count_rows,
    fingerprint,
    rows_of_file,
)

SAMPLE_ROWS = 32
BATCH = 256


@dataclass(frozen=True)
class Source:
    """A dataset to be read once.

    Attributes:
        name: for people.
        fingerprint: tells the dataset from another, in any process.
        total: rows; None where that is not known.
        sample: its first rows.
    """

    name: str
    fingerprint: dict[str, Any]
    total: int | None
    sample: tuple[Row, ...]
    _rows: Callable[[Wanted], Iterator[tuple[int, Row]]]
    _limit: int | None = None

    def rows(self, wanted: Wanted = lambda row: True) -> Iterator[tuple[int, Row]]:
        """Yield `(number, row)`, in order, of rows whose number is wanted; others are not looked at where they need
        not be. A row is a mapping, or a `BadRow` where there is none."""
        for number, row in self._rows(wanted):
            if self._limit is not None and number >= self._limit:
                return
            yield number, _checked(row)


def open_source(
    dataset: Any, *, split: str | None = None, subset: str | None = None, limit: int | None = None
) -> Source:
    """Open a dataset.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset` (or a dict of them by split); a .jsonl, .csv (gzipped or
            not) or .parquet file or a list of such; a folder or hub name that `datasets` loads; or rows, as mappings.
        split: which, where there are several.
        subset: configuration of a hub dataset.
        limit: only the first so many rows.

    Raises:
        BadInput: it cannot be opened, or `split` is missing or unknown.
    """
    if limit is not None and limit < 0:
        raise BadInput(f"limit={limit}: must be at least 0")
    if isinstance(dataset, (str, Path)):
        dataset = _named(str(dataset), subset)
    if isinstance(dataset, Mapping):
        dataset = _of_split(dataset, split)
    elif split is not None:
        raise BadInput(f"split={split}: the dataset has no splits; leave it out")
    if isinstance(dataset, Sequence) and dataset and all(isinstance(part, (str, Path)) for part in dataset):
        made = _files([Path(part).expanduser() for part in dataset])
    elif hasattr(dataset, "column_names") and hasattr(dataset, "__getitem__") and hasattr(dataset, "num_rows"):
        made = _table(dataset)
    elif isinstance(dataset, Iterable):
        made = _iterable(dataset)
    else:
        raise BadInput(f"dataset is a {type(dataset).__name__}: give a dataset, a file, a name, or a list of rows")
    name, print_, total, sample, rows = made
    if limit is not None:
        total = limit if total is None else min(total, limit)
    return Source(name, print_, total, tuple(sample), rows, limit)


def _named(name: str, subset: str | None) -> Any:
    """A file as a list of one; else what `datasets` loads by that name."""
    path = Path(name).expanduser()
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_file() or suffix in KINDS or name.startswith((".", "/", "~")) and not path.exists():
        if subset is not None:
            raise BadInput(f"subset={subset}: a file has none; leave it out")
        return [path]
    try:
        import datasets
    except ImportError as error:
        raise BadInput(f"dataset {name}: needs datasets: pip install 'hf-paged[datasets]'") from error
    try:
        if path.is_dir() and any((path / kind).exists() for kind in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(name, subset, streaming=True)
    except Exception as error:  # whatever a builder, a hub or a network raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"dataset {name}: cannot be loaded: {first}") from error


def _of_split(splits: Mapping[str, Any], split: str | None) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        said = "several splits: say which" if split is None else f"no split {split!r}: choose"
        raise BadInput(f"the dataset has {said} of {', '.join(map(str, splits))}")
    return splits[split]


Made = tuple[str, dict[str, Any], int | None, list[Row], Callable[[Wanted], Iterator[tuple[int, Row]]]]


def _files(paths: list[Path]) -> Made:
    counts = []
    prints = []
    for path in paths:
        counts.append(count_rows(path))
        prints.append(fingerprint(path))

    def rows(wanted: Wanted) -> Iterator[tuple[int, Row]]:
        first = 0
        for path, count in zip(paths, counts, strict=True):
            if count is None and path is not paths[-1]:
                count = sum(1 for _ in rows_of_file(path, 0, lambda row: True))
            yield from rows_of_file(path, first, wanted)
            first += count or 0

    total = None if None in counts else sum(counts)
    sample = [row for _, row in islice(rows(lambda row: True), SAMPLE_ROWS)]
    whole = prints[0] if len(prints) == 1 else {"files": prints}
    return ", ".join(map(str, paths)), whole, total, sample, rows


def _table(dataset: Any) -> Made:
    """A `datasets.Dataset`: rows are read by place, in batches."""
    total = dataset.num_rows
    sample = _slice(dataset, 0, min(SAMPLE_ROWS, total))

    def rows(wanted: Wanted) -> Iterator[tuple[int, Row]]:
        for begin in range(0, total, BATCH):
            places = [i for i in range(begin, min(begin + BATCH, total)) if wanted(i)]
            if places:
                batch = _slice(dataset, begin, min(begin + BATCH, total))
                yield from ((i, batch[i - begin]) for i in places)

    kept = {"columns": list(dataset.column_names), "rows": total, "first": _digest(sample)}
    return "a dataset in memory", kept, total, sample, rows


def _slice(dataset: Any, begin: int, end: int) -> list[Row]:
    columns = dataset[begin:end]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _iterable(dataset: Iterable[Row]) -> Made:
    """Anything that yields rows: an `IterableDataset`, a list, a generator (which is read once)."""
    total = len(dataset) if hasattr(dataset, "__len__") else None
    stream = iter(dataset)
    sample = list(islice(stream, SAMPLE_ROWS))

    def rows(wanted: Wanted) -> Iterator[tuple[int, Row]]:
        again = chain(sample, stream) if stream is dataset else dataset
        return ((number, row) for number, row in enumerate(again) if wanted(number))

    return "rows given", {"rows": total, "first": _digest(sample)}, total, sample, rows


def _digest(rows: list[Row]) -> str:
    """Of the values that JSON knows; of others, their type."""
    text = json.dumps([r if isinstance(r, BadRow) else _plain(r) for r in rows], default=_type_name, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(row: Any) -> Any:
    return {str(key): value for key, value in row.items()} if isinstance(row, Mapping) else row


def _type_name(value: Any) -> str:
    return type(value).__name__


def _checked(row: Row) -> Row:
    if isinstance(row, (Mapping, BadRow)):
        return row
    return BadRow(f"the row is no mapping of columns but a {type(row).__name__}")
