"""What all that draft by a model's forwards have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager

import torch

from hf_paged.memory import PageCopy
from hf_paged.plan import PlanRow, StepPlan, build_plan
from hf_paged.sequence import Sequence
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.guide import Guide
from hf_paged.speculation.proposal import Proposal, Verdict
from hf_paged.store import KVStore

logger = logging.getLogger("hf_paged")
CLOSELY = 16  # calls between two close looks at a model that seems to be what it was
KINDS, RANKS = 12, 3  # a draft's probability, in so many steps; and whether it is the likeliest, the second, another


def kind_of(prob: float, rank: int = 0) -> int:
    """The kind of a draft to which its model gives this probability, after so many likelier ones.

    The target takes a likeliest token far more often than another one of the same probability.
    """
    return min(int(prob * KINDS), KINDS - 1) + KINDS * min(rank, RANKS - 1)


def likelihood(prob: float, rank: int = 0) -> float:
    """Odds that the target takes such a draft, until something is known: of a likeliest one far more than its
    probability (a pair of small models: 0.7 at 0.1, 0.8 at 0.4, 0.9 at 0.6)."""
    return prob**0.5 if rank == 0 else prob


class Drafter:
    """Drafts by forwards of a model. A subclass says how: see `_draft`.

    Args:
        forward: plan → logits `[n, vocab]`; stores KV of the plan's tokens in `store`.
        store: the draft model's KV. None: the target's own forward stores it.
        page_size: of `store`.
        most: tokens of one forward.
        longest: tokens of a row that its model can take.

    Attributes:
        cost: of its forwards. seconds: spent in drafting. failed: whether it has given up.
        lag: tokens that it took in at first in the latest step, beside those of which it drafted.
        measured: as in `Proposers`.
    """

    def __init__(
        self,
        forward: Callable[[StepPlan], torch.Tensor],
        store: KVStore | None,
        page_size: int,
        *,
        name: str = "draft",
        device: torch.device | str = "cpu",
        backend: str = "auto",
        most: int = 512,
        longest: int = 1 << 60,
    ) -> None:
        self.forward, self.store, self.page_size, self.name = forward, store, page_size, name
        self.device, self.backend, self.most, self.longest = device, backend, most, longest
        self.cost, self.seconds, self.failed, self.lag = CostTable(), 0.0, False, 0
        self.measured: Callable[[float], float] = float
        self._calls = 0  # of `look_again`
        self._stale = False  # whether its model may have changed since it was looked at
        self._changed = False  # whether a look has found that it did, which nobody was told yet

    def propose(
        self, rows: Rows[PlanRow], deepest: Rows[int], guide: Guide, reserve: Callable[[PlanRow, int], bool]
    ) -> list[Proposal | None]:
        """Drafts for each row, at most `deepest` deep. An error of the model's is logged, and nothing more is drafted.

        Args:
            reserve: makes slots for so many drafts of a row writable, or says that it cannot.
        """
        try:
            self._look()
            return self._draft(rows, deepest, guide, reserve)
        except Exception as error:
            logger.warning("%s failed: nothing more is drafted by it (%s: %s)", self.name, type(error).__name__, error)
            self.failed = True
            self._give_up(rows)
            return [None] * len(rows)

    def _draft(
        self, rows: Rows[PlanRow], deepest: Rows[int], guide: Guide, reserve: Callable[[PlanRow, int], bool]
    ) -> list[Proposal | None]:
        raise NotImplementedError

    def _give_up(self, rows: Rows[PlanRow]) -> None:
        """It failed in drafting for `rows`."""
        self.forget()

    def ready(self) -> bool:
        """Whether it may draft; where looking at its model fails, `propose` will say so."""
        try:
            self._look()
        except Exception:
            return False
        return True

    def _look(self) -> None:
        """Look at its model, if that may have changed: not before it drafts, since it may never do so."""
        if not self._stale:
            return
        if self.forward.refresh():  # KV of what it was is of no use, and what failed may be mended
            self.forget()
            self._changed, self.failed = True, False
        self._stale = False

    # -- what the engine tells

    def look_again(self, closely: bool = False) -> bool:
        """Its model may have changed. Where that can be told barely, it is looked at closely if it did, and now and
        then: tokens are right whatever its drafts are.

        Returns:
            whether it is known to be another one than at the latest call.
        """
        altered = getattr(self.forward, "altered", None)
        found = altered is not None and altered()
        self._calls += 1
        self._stale |= closely or found or altered is None or self.failed or self._calls % CLOSELY == 0
        if found or self.failed:
            self.ready()
        changed, self._changed = self._changed, False
        return changed

    def forget(self) -> None:
        """No KV is known any more."""

    def taken(self, pages: Rows[int]) -> None:
        """These pages of the target's begin anew."""

    def copied(self, copies: list[PageCopy]) -> None:
        """Pages of the target's were copied."""

    def settle(self, planned: PlanRow, verdict: Verdict, computed: int) -> None:
        """What the target made of a proposal; `computed` tokens of the row were, before."""

    def tidy(self, alive: set[Sequence]) -> None:
        """Only these sequences of the target's are open."""

    def check(self, alive: set[Sequence]) -> None:
        """Verify the laws of its own memory; raises AssertionError where one does not hold."""

    # -- forwards

    @contextmanager
    def _timed(self, guide: Guide, tokens: int = 0) -> Iterator[None]:
        """Note what drafting took: a forward over so many tokens, or, with 0, what lies outside of them."""
        begun = time.perf_counter()
        yield
        seconds = self.measured(time.perf_counter() - begun)
        if tokens:
            self.cost.note(tokens, seconds)
        self.seconds += seconds
        if guide.ledger is not None:
            guide.ledger.spent += seconds

    def _run(self, rows: list[PlanRow]) -> torch.Tensor:
        """One forward; logits in the order of `rows`."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].count > 1 or rows[i].branches)
        plan = build_plan([rows[i] for i in order], self.page_size, self.device, self.backend)
        logits = self.forward(plan)
        if order == list(range(len(rows))) or not len(logits):
            return logits
        starts, at = {}, 0
        for i in order:
            starts[i] = at
            at += rows[i].logits
        index = [starts[i] + j for i in range(len(rows)) for j in range(rows[i].logits)]
        return logits[torch.tensor(index, device=logits.device)]

    def _run_in_parts(self, rows: list[PlanRow]) -> torch.Tensor:
        """As `_run`, in as many forwards as `most` asks for; each row has at most that many tokens."""
        parts, waiting, total = [], [], 0
        for row in [*rows, None]:
            if waiting and (row is None or total + row.count > self.most):
                parts.append(self._run(waiting))
                waiting, total = [], 0
            if row is not None:
                waiting.append(row)
                total += row.count
        return parts[0] if len(parts) == 1 else torch.cat(parts)
