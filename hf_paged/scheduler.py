"""Which rows compute how many tokens in the next step. A pure function of what it is shown.

Continuous batching after Yu et al., "Orca", OSDI 2022; prompts in chunks beside the decodes after Agrawal et al.,
"Sarathi-Serve", OSDI 2024; preemption by recomputation as in PagedAttention (SOSP 2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from hf_paged.prefix_cache import Found
from hf_paged.request import Row
from hf_paged.supply import InFlight, Prospect, Supply, longest_prefix_first

# Waiting rows that are ranked among each other, and that are looked at in one step.
WINDOW = 32
MOST_LOOKED_AT = 256


@dataclass(frozen=True)
class Work:
    """`row` computes its next `count` tokens, for which it must take `pages` from the pool (0: it has all it needs).

    A row that was waiting begins with what is `found` in the prefix cache.
    """

    row: Row
    count: int
    pages: int
    found: Found | None = None


@dataclass(frozen=True)
class Decision:
    """What the next step does.

    Attributes:
        work: rows to compute, those with one token first.
        admitted: the part of `work` whose rows were waiting, in order.
        preempted: rows that must give up their pages and wait.
    """

    work: tuple[Work, ...] = ()
    admitted: tuple[Work, ...] = ()
    preempted: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Tokens of one step, rows at a time, pages that can be had now, tokens a page, and rows of logits behind prompt
    tokens in one step (those that new tokens are drawn from come on top)."""

    max_batch_tokens: int
    max_sequences: int
    free_pages: int
    page_size: int
    max_logits: int = 1 << 60


def decide(running: Iterable[Row], waiting: Iterable[Row], limits: Limits, supply: Supply) -> Decision:
    """Choose the next step.

    Rows that decode come before rows whose prompt is in the making, both in order of priority and arrival. Where pages
    run out, the row that goes last gives up its own. What budget remains goes to prompts in the making and then to
    waiting rows, those first that find most of their tokens in the prefix cache; a row is admitted when all its known
    tokens fit, and not while another computes what it could share.

    Args:
        running: rows with pages.
        waiting: rows without, in the order in which they should be admitted; read only as far as needed.
        limits: see `Limits`.
        supply: what rows need of the pool, and find there.
    """
    ordered = sorted(running, key=lambda row: row.order)
    grants = _Grants(ordered, limits, supply)
    for row in sorted(ordered, key=lambda row: row.sequence.pending != 1):
        grants.give(row)
    admitted = []
    if not grants.preempted:
        admitted = _admit(iter(waiting), limits, grants, supply)
    # Decodes first, longest first: attention serves neighbours of like length together.
    work = sorted(grants.work + admitted, key=lambda w: (w.count > 1, -len(w.row.tokens)))
    return Decision(tuple(work), tuple(admitted), tuple(grants.preempted))


class _Grants:
    """What running rows get in a step, and which of them give up their pages for it."""

    def __init__(self, rows: Iterable[Row], limits: Limits, supply: Supply) -> None:
        self.supply = supply
        self.alive = dict.fromkeys(rows)
        self.free, self.budget, self.logits = limits.free_pages, limits.max_batch_tokens, limits.max_logits
        self.work: list[Work] = []
        self.preempted: list[Row] = []

    def give(self, row: Row) -> None:
        """Tokens of the budget and pages to `row`, unless it has lost its own."""
        if row not in self.alive or self.budget == 0:
            return
        count = self.ration(row, row.sequence.computed, min(row.sequence.pending, self.budget))
        if count == 0:
            return
        want = self.supply.needed(row, count)
        while want > self.free and row in self.alive:
            self._preempt_last()
        if row in self.alive:
            self.free -= want
            self.budget -= count
            self.work.append(Work(row, count, want))

    def ration(self, row: Row, begin: int, count: int) -> int:
        """Of the next `count` tokens of `row`, from `begin` on, as many as leave its logits within the limit."""
        if not row.scores_prompt:
            return count
        logits = row.logits_of(begin, count)
        count -= max(logits - self.logits, 0)
        self.logits -= min(logits, self.logits)
        return count

    def _preempt_last(self) -> None:
        victim, _ = self.alive.popitem()
        self.preempted.append(victim)
        self.free += self.supply.freed(victim)
        for work in [work for work in self.work if work.row is victim]:
            self.work.remove(work)
            self.free += work.pages
            self.budget += work.count


def _admit(waiting: Iterable[Row], limits: Limits, grants: _Grants, supply: Supply) -> list[Work]:
    """Waiting rows that fit into what is left; the first that does not fit ends it."""
    plan = _Admission(limits, grants, supply)
    while plan.open and (window := list(islice(waiting, WINDOW))):
        prospects = [(row, supply.prospect(row)) for row in window]
        for row, prospect in longest_prefix_first(prospects, plan.newest, limits.page_size):
            if not plan.open or not plan.consider(row, prospect):
                return plan.admitted
    return plan.admitted


class _Admission:
    """Waiting rows, one after another, against what running rows have left."""

    def __init__(self, limits: Limits, grants: _Grants, supply: Supply) -> None:
        self.limits, self.free, self.budget = limits, grants.free, grants.budget
        self.supply, self.ration = supply, grants.ration
        self.running, self.places = len(grants.alive), limits.max_sequences - len(grants.alive)
        self.newest = max((row.request.number for row in grants.alive), default=0)
        self.in_flight = InFlight(grants.alive, limits.page_size)
        self.admitted: list[Work] = []
        self.claimed: set[int] = set()  # idle pages that rows of this step begin with
        self.looked = 0

    @property
    def open(self) -> bool:
        """Whether any row could be admitted still."""
        return self.budget > 0 and self.places > 0 and self.free > 0 and self.looked < MOST_LOOKED_AT

    def consider(self, row: Row, prospect: Prospect) -> bool:
        """Admit `row`, or let it wait for what another computes. False: it does not fit, so nobody else is asked."""
        self.looked += 1
        if prospect.found is not None and self.in_flight.brings(row, prospect):
            return True
        branches = len(row.request.rows) if row.index == 0 and not row.output_ids else 1
        if self.places < min(branches, self.limits.max_sequences):
            return False
        if not self._fits(prospect) and prospect.found is not None:
            prospect = self.supply.frugal(row, prospect)
        if not self._fits(prospect):
            return False
        count = self.ration(row, prospect.known, min(len(row.tokens) - prospect.known, self.budget))
        if count == 0:
            return True
        self.free -= prospect.fresh + len(self._unclaimed(prospect))
        self.claimed.update(prospect.idle)
        self.budget -= count
        self.places -= branches
        self.admitted.append(Work(row, count, prospect.fresh, prospect.found))
        if prospect.found is not None:
            self.in_flight.add(row, prospect.found.node)
        return True

    def _fits(self, prospect: Prospect) -> bool:
        # A page of headroom a running row, so that what is admitted now is not thrown out again at once.
        headroom = min(self.running + len(self.admitted), self.limits.free_pages // 8)
        return prospect.fresh + len(self._unclaimed(prospect)) + headroom <= self.free

    def _unclaimed(self, prospect: Prospect) -> list[int]:
        return [page for page in prospect.idle if page not in self.claimed]
