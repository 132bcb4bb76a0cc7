"""Which rows compute how many tokens in the next step. A pure function of what it is shown.

Continuous batching after Yu et al., "Orca", OSDI 2022; prompts in chunks beside the decodes after Agrawal et al.,
"Sarathi-Serve", OSDI 2024; preemption by recomputation as in PagedAttention (SOSP 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hf_paged.request import Row


@dataclass(frozen=True)
class Work:
    """`row` computes its next `count` tokens, for which it must take `pages` from the pool (0: it has all it needs)."""

    row: Row
    count: int
    pages: int


@dataclass(frozen=True)
class Decision:
    """What the next step does.

    Attributes:
        work: rows to compute, those with one token first.
        admitted: rows in `work` that were waiting, in order.
        preempted: rows that must give up their pages and wait.
    """

    work: tuple[Work, ...] = ()
    admitted: tuple[Row, ...] = ()
    preempted: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Tokens of one step, rows at a time, pages free now, tokens a page."""

    max_batch_tokens: int
    max_sequences: int
    free_pages: int
    page_size: int


def decide(
    running: Iterable[Row], waiting: Iterable[Row], limits: Limits, needed: Callable[[Row, int], int]
) -> Decision:
    """Choose the next step.

    Rows that decode come before rows whose prompt is in the making, both in order of priority and arrival. Where pages
    run out, the row that goes last gives up its own. What budget remains goes to prompts in the making and then to
    waiting rows, first come first served within a priority; a row is admitted when all its known tokens fit.

    Args:
        running: rows with pages.
        waiting: rows without, in the order in which they should be admitted; read only as far as needed.
        limits: see `Limits`.
        needed: pages that a running row must take from the pool to compute so many more tokens.
    """
    ordered = sorted(running, key=lambda row: row.order)
    grants = _Grants(ordered, limits)
    for decoding in (True, False):
        for row in ordered:
            if (row.sequence.pending == 1) == decoding:
                grants.give(row, needed)
    admitted = []
    if not grants.preempted:
        admitted = _admit(waiting, limits, grants.free, grants.budget, len(grants.alive))
    # Decodes first, longest first: attention serves neighbours of like length together.
    work = sorted(grants.work + admitted, key=lambda w: (w.count > 1, -len(w.row.tokens)))
    return Decision(tuple(work), tuple(w.row for w in admitted), tuple(grants.preempted))


class _Grants:
    """What running rows get in a step, and which of them give up their pages for it."""

    def __init__(self, rows: Iterable[Row], limits: Limits) -> None:
        self.alive = dict.fromkeys(rows)
        self.free, self.budget = limits.free_pages, limits.max_batch_tokens
        self.work: list[Work] = []
        self.preempted: list[Row] = []

    def give(self, row: Row, needed: Callable[[Row, int], int]) -> None:
        """Tokens of the budget and pages to `row`, unless it has lost its own."""
        if row not in self.alive or self.budget == 0:
            return
        count = min(row.sequence.pending, self.budget)
        want = needed(row, count)
        while want > self.free and row in self.alive:
            self._preempt_last()
        if row in self.alive:
            self.free -= want
            self.budget -= count
            self.work.append(Work(row, count, want))

    def _preempt_last(self) -> None:
        victim, _ = self.alive.popitem()
        self.preempted.append(victim)
        self.free += len(victim.sequence.pages)
        for work in [work for work in self.work if work.row is victim]:
            self.work.remove(work)
            self.free += work.pages
            self.budget += work.count


def _admit(waiting: Iterable[Row], limits: Limits, free: int, budget: int, alive: int) -> list[Work]:
    """Waiting rows that fit into what is left, in their order; the first that does not fit ends it."""
    admitted: list[Work] = []
    places = limits.max_sequences - alive
    for row in waiting:
        branches = len(row.request.rows) if row.index == 0 and not row.output_ids else 1
        if budget == 0 or places < min(branches, limits.max_sequences):
            break
        known = -(-len(row.tokens) // limits.page_size)
        # A page of headroom a running row, so that what is admitted now is not thrown out again at once.
        headroom = min(alive + len(admitted), limits.free_pages // 8)
        if known + headroom > free:
            break
        count = min(len(row.tokens), budget)
        free -= known
        budget -= count
        places -= branches
        admitted.append(Work(row, count, known))
    return admitted
