"""Prompts and output lengths from local files: .jsonl, .csv, .txt (a prompt a line), gzipped or not."""

from __future__ import annotations

import csv
import gzip
import json
import string
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

# Columns that hold output lengths in well known traces and in the file that ships with this project.
LENGTH_COLUMNS = ("output_tokens", "GeneratedTokens", "num_decode_tokens")


class BadInput(ValueError):
    """Something that the user gave cannot be used; the message says what, where and what would do."""


def rows_of(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl, .csv or .txt file, gzipped or not, as dicts.

    A line of a .txt file becomes `{"prompt": line}`; empty lines are skipped.

    Raises:
        BadInput: if there is no such file, its kind is not known, or a line cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    readers = {".jsonl": _json_rows, ".csv": csv.DictReader, ".txt": _text_rows}
    if suffix not in readers:
        raise BadInput(f"{path}: not a kind of file that is read here; give .jsonl, .csv or .txt, gzipped or not")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="" if suffix == ".csv" else None) as lines:
            yield from readers[suffix](lines)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _json_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"line {number} is not a JSON object: {line.strip()[:60]}")
        yield row


def _text_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return ({"prompt": line.rstrip("\n")} for line in lines if line.strip())


def _take(path: str | Path, field: str, count: int | None) -> list[Any]:
    """The first `count` values of a field (all, with None)."""
    values = []
    for row in islice(rows_of(path), count):
        if row.get(field) is None:
            raise BadInput(f"{path}: row {len(values) + 1} has no field {field!r}; it has: {', '.join(map(str, row))}")
        values.append(row[field])
    if not values:
        raise BadInput(f"{path}: holds no rows")
    if count is not None and len(values) < count:
        raise BadInput(f"{path}: {count} rows were asked for and it holds {len(values)}")
    return values


def read_column(path: str | Path, field: str, count: int | None = None) -> list[list[int]]:
    """Read a field that holds lists of whole numbers.

    Raises:
        BadInput: on a file or field that cannot be used.
    """
    values = _take(path, field, count)
    for row, value in enumerate(values, 1):
        if not isinstance(value, list) or not value or not all(type(n) is int and n >= 0 for n in value):
            raise BadInput(f"{path}: {field} of row {row} is no list of whole numbers")
    return values


def read_prompts(path: str | Path, field: str, template: str | None = None, count: int | None = None) -> list[str]:
    """Read prompts from a file.

    Args:
        path: see `rows_of`.
        field: which field or column holds the text; a list of texts gives its first one.
        template: a `str.format` text with the field's name in braces; None gives the text as it is.
        count: how many prompts; None takes all.

    Raises:
        BadInput: on a file, field, template or count that cannot be used.
    """
    texts = [value[0] if isinstance(value, list) and value else value for value in _take(path, field, count)]
    if template is None:
        return [str(text) for text in texts]
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise BadInput(f"template {template!r} is not a format text: {error}") from error
    if names != {field}:
        raise BadInput(f"template {template!r} must name the field in braces, and only it: {{{field}}}")
    return [template.format(**{field: text}) for text in texts]


def read_lengths(source: str, count: int, cap: int, field: str | None = None) -> list[int]:
    """Read output lengths in tokens.

    Args:
        source: one length for all, as digits, or a file (see `rows_of`).
        count: how many lengths.
        cap: no length is over it; a length of zero counts as one.
        field: the column; by default the only one, or one of `LENGTH_COLUMNS`.

    Raises:
        BadInput: on a source that cannot be used.
    """
    if cap < 1:
        raise BadInput(f"the cap of output lengths must be at least 1, not {cap}")
    text = str(source).strip()
    if text.lstrip("-").isdigit():
        if int(text) < 1:
            raise BadInput(f"an output length must be at least 1, not {text}")
        return [min(int(text), cap)] * count
    field = field or _length_column(text)
    lengths = []
    for value in _take(text, field, count):
        try:
            lengths.append(min(cap, max(1, int(float(value)))))
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(f"{text}: {field} of row {len(lengths) + 1} is not a number: {value!r}") from error
    return lengths


def _length_column(path: str) -> str:
    columns: Sequence[str] = list(next(iter(rows_of(path)), {}))
    known = [name for name in LENGTH_COLUMNS if name in columns]
    if len(columns) == 1 or known:
        return known[0] if known else columns[0]
    raise BadInput(
        f"{path}: say with --lengths-field which of its columns holds lengths: {', '.join(columns) or 'none'}"
    )
