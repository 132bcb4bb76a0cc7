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
    decodes = [row for row in ordered if row.sequence.pending == 1]
    prefills = [row for row in ordered if row.sequence.pending > 1]
    alive = dict.fromkeys(ordered)
    work: list[Work] = []
    preempted: list[Row] = []
    free, budget = limits.free_pages, limits.max_batch_tokens
    granted: dict[Row, int] = {}
    for row in decodes + prefills:
        if row not in alive or budget == 0:
            continue
        count = min(row.sequence.pending, budget)
        want = needed(row, count)
        while want > free and row in alive:
            victim = next(reversed(alive))
            del alive[victim]
            preempted.append(victim)
            free += len(victim.sequence.pages) + granted.pop(victim, 0)
            if victim is not row:
                budget += sum(w.count for w in work if w.row is victim)
                work = [w for w in work if w.row is not victim]
        if row in alive:
            free -= want
            budget -= count
            granted[row] = want
            work.append(Work(row, count, want))
    admitted = [] if preempted else _admit(waiting, limits, free, budget, len(alive))
    # Decodes first, longest first: attention serves neighbours of like length together.
    work = sorted(work + admitted, key=lambda w: (w.count > 1, -len(w.row.tokens)))
    return Decision(tuple(work), tuple(w.row for w in admitted), tuple(preempted))


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
