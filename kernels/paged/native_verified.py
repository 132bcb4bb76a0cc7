"""Steps with drafts on a CPU, several in one compiled call: `few_verified` of `csrc/verified.c`. Optional."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hf_paged.kernels.groups import LEAST_CAUSAL, least_together
from hf_paged.kernels.native import address, native_ops
from hf_paged.kernels.native_blocks import FewModel

NODES, DEPTHS, MATCHES = 62, 3, 7  # drafts of a row; depths and matches whose odds are kept apart
NOBODY, TEXT, MODEL, FOLLOWED = range(4)  # who drafted
_I, _D, _P = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _fields(integers: str, pointers: str = "", doubles: str = "") -> list[tuple[str, type]]:
    kinds = (pointers, _P), (integers, _I), (doubles, _D)
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _Model(ctypes.Structure):
    _fields_ = [("ends", _P), ("blocks", _P), ("count", _I), ("sizes", _P), ("factors", _P)]


class _Row(ctypes.Structure):
    _fields_ = [
        *[("text", _P), ("length", _I), ("slots", _I), ("left", _I), ("known", _I), ("stops", _P), ("num_stops", _I)],
        *[("followed", _P), ("begin", _I), ("end", _I), ("behind", _I)],
        *[("taken", _D * 3), ("expected", _D * 3), ("value", _D), ("ended", _I)],
    ]


class _Record(ctypes.Structure):
    _fields_ = _fields("done spoilt", "counts nodes paths tokens chains")
    _fields_ += [("odds", _P), ("seconds", _P)]


class Rules(ctypes.Structure):
    """What is drafted; see `rules` in `verified.h`. Arrays are given by `with_tables`."""

    _fields_ = [
        *_fields("ngram deepest usual sure chain width kinds"),
        *_fields("", "looked repeated drafted seconds forward"),
        *_fields("most together least_slots ending"),
        *_fields("", "", "margin cheapest least plain behind row_decay row_trust expected price"),
    ]

    def with_tables(self, texts: np.ndarray, drafted: np.ndarray, seconds: np.ndarray, forward: np.ndarray) -> Rules:
        """Odds of what is looked up and of a text that is repeated, float32 `[2, DEPTHS, MATCHES]`, and of a model's
        drafts, `[DEPTHS, 3 * kinds]`; seconds, float64, of a step by its number of drafts, and of the draft model's
        forward by that of its lines."""
        self._alive = *texts, drafted, seconds, forward
        places = (address(table) for table in self._alive)
        self.looked, self.repeated, self.drafted, self.seconds, self.forward = places
        self.most = len(seconds) - 1
        return self


class Followed(NamedTuple):
    """Tokens of a text that a row repeats, int64, from place `begin` of it on; None: those of the row itself.

    What comes next in the row stands `behind` places further there.
    """

    tokens: np.ndarray | None
    begin: int
    behind: int


@dataclass(slots=True)
class TextRow:
    """A row before its steps.

    Attributes:
        text: int64, its tokens, with room for those that it may have yet.
        length: how many are known; KV of all but the last is stored, and of `known` that of the draft model.
        slots: that its pages have. left: tokens that it may have yet. stops: ids that end it.
        records: drafts taken and expected so far, of its text, of a draft model and of `followed`.
        value: what a token of it is worth.
        followed: the text that it repeats, if there is one.
    """

    text: np.ndarray
    length: int
    slots: int
    left: int
    stops: Sequence[int]
    known: int
    records: tuple[tuple[float, float], ...]
    value: float
    followed: Followed | None = None


@dataclass(slots=True)
class Made:
    """What a step made of a row: drafts that were verified, indices of those that were taken, and tokens drawn; nothing
    of one that had ended."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    kinds: tuple[int, ...]
    odds: tuple[float, ...]
    path: tuple[int, ...]
    drawn: list[int]
    source: int


@dataclass(slots=True)
class Visit:
    """What came of several steps.

    Attributes:
        steps: of each, what it made of each row.
        seconds: of each, of its forward and of drafting. chains: tokens that the draft model took in at first, its
            depth, and its lines in all.
        known: tokens of each row of which the draft model's KV is stored.
        spoilt: whether a number was not finite in the step that would have been next: it is to be made anew.
    """

    steps: list[list[Made]]
    seconds: list[list[float]]
    chains: list[list[int]]
    known: list[int]
    spoilt: bool


class VerifiedOp:
    """Steps of rows that have one token each to compute, and drafts behind it.

    Args:
        page_size: of the pages of both models.
    """

    def __init__(self, library: ctypes.CDLL, page_size: int) -> None:
        self._run, self.page_size = library.few_verified, page_size
        self._run.argtypes = [_P, _P, _P, _P, _I, _P, _P, _P, _I, _I]
        self._sights = np.zeros((2, 6), np.int64)

    def __call__(
        self,
        models: tuple[FewModel, FewModel | None],
        rows: Sequence[TextRow],
        rules: Rules,
        parameters: Sequence[np.ndarray],
        table: np.ndarray,
        steps: int,
    ) -> Visit:
        """No step follows one behind which more rows have ended than `rules.ending`, or one has no slots.

        Args:
            models: target and the draft model, if there is one; both must name frequencies, and no window hides
                anything.
            parameters: as `SamplingOps` takes them. table: int64 `[rows, pages]`, with pages for all drafts; no page
                stands twice.

        Raises:
            IndexError: a token that a model does not have.
            MemoryError: there was none for the lines' numbers on their way.
        """
        rules.together, rules.least_slots = least_together(models[0].sharing), LEAST_CAUSAL
        count = len(rows)
        lines = max(count + min(rules.most, NODES * count), sum(row.length - row.known for row in rows))
        given, kept = _given(rows)
        record = _Room(count, steps)
        settings = np.array([address(part) for part in parameters], np.int64)
        made = [self._model(model, sight, table.shape[1]) for model, sight in zip(models, self._sights, strict=True)]
        target, draft = (None if model is None else ctypes.byref(model[0]) for model in made)
        places = given, count, ctypes.byref(rules), address(settings), address(table)
        failed = self._run(ctypes.byref(record.fields), target, draft, *places, steps, lines)
        if failed == 2:
            raise IndexError("a token is none of the model's")
        if failed:
            raise MemoryError(f"no memory for {lines} lines of {models[0].outputs} numbers")
        return record.visit([entry.known for entry in given])

    def _model(
        self, model: FewModel | None, sight: np.ndarray, pages: int
    ) -> tuple[_Model, np.ndarray, np.ndarray] | None:
        if model is None:
            return None
        model.blocks[:, -1] = address(sight)
        sizes = np.array([0, *model.sizes, self.page_size, pages], np.int64)
        factors = np.array([model.turn, model.scale, model.eps], np.float32)
        return _Model(*model.places, address(sizes), address(factors)), sizes, factors


def _given(rows: Sequence[TextRow]) -> tuple[ctypes.Array[_Row], list[np.ndarray]]:
    """Rows as the op reads them, and what they point to."""
    kept, given = [], (_Row * len(rows))()
    for entry, row in zip(given, rows, strict=True):
        stops = np.array([*row.stops, 0], np.int64)
        kept.append(stops)
        entry.text, entry.stops, entry.num_stops = address(row.text), address(stops), len(row.stops)
        entry.length, entry.slots, entry.left = row.length, row.slots, row.left
        entry.known, entry.value = row.known, row.value
        if row.followed is not None:
            text, entry.begin, entry.behind = row.followed
            entry.followed, entry.end = address(row.text if text is None else text), -1
            if text is not None:
                entry.end = entry.begin + len(text)
        for source, (taken, expected) in enumerate(row.records):
            entry.taken[source], entry.expected[source] = taken, expected
    return given, kept


class _Room:
    """For what comes of so many steps of so many rows."""

    def __init__(self, rows: int, steps: int) -> None:
        room = NODES * rows * steps
        self.counts, self.chains = np.zeros((steps, rows, 4), np.int64), np.zeros((steps, 3), np.int64)
        self.nodes, self.paths = np.empty((room, 3), np.int64), np.empty(room, np.int64)
        self.tokens = np.empty(room + rows * steps, np.int64)
        self.odds, self.seconds = np.empty(room, np.float32), np.empty((steps, 2))
        arrays = self.counts, self.nodes, self.paths, self.tokens, self.chains
        self.fields = _Record(*(address(part) for part in arrays), 0, 0, address(self.odds), address(self.seconds))

    def visit(self, known: list[int]) -> Visit:
        """What was written there."""
        done, (n, taken, drawn, _) = self.fields.done, self.counts.sum((0, 1)).tolist()
        parts = self.nodes[:n], self.odds[:n], self.paths[:taken], self.tokens[:drawn]
        steps = _presented(self.counts[:done].tolist(), *(part.tolist() for part in parts))
        spoilt = bool(self.fields.spoilt)
        return Visit(steps, self.seconds[:done].tolist(), self.chains[:done].tolist(), known, spoilt)


def _presented(counts: list, nodes: list, odds: list, paths: list, tokens: list) -> list[list[Made]]:
    """What lies one behind another, step by step and row by row."""
    flat = [entry for step in counts for entry in step]
    ends = np.array([[0, 0, 0], *(entry[:3] for entry in flat)], np.int64).cumsum(0).tolist()
    rows = []
    for entry, (begin, end) in zip(flat, pairwise(ends), strict=True):
        drawn = tokens[begin[2] : end[2]]
        if not entry[0]:
            rows.append(Made((), (), (), (), (), drawn, NOBODY))
            continue
        columns, path = zip(*nodes[begin[0] : end[0]], strict=True), tuple(paths[begin[1] : end[1]])
        rows.append(Made(*columns, tuple(odds[begin[0] : end[0]]), path, drawn, entry[3]))
    size = len(counts[0]) if counts else 1
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def verified_op(page_size: int) -> VerifiedOp | None:
    """The compiled op, to be used by one thread at a time; None where there is none."""
    ops = native_ops()
    return None if ops is None else VerifiedOp(ops.library, page_size)
