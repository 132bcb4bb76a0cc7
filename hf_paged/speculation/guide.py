"""How much drafting pays: expected tokens against measured seconds.

A step with drafts makes `drawn + sum(reach)` tokens, where `reach` is a draft's odds of being taken, in the time of the
forward over all of them and of the drafting. What is added must raise the quotient; zero is an allowed answer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hf_paged.plan import PlanRow
from hf_paged.speculation.acceptance import Acceptance, RowRecord
from hf_paged.speculation.cost import STRAY, CostTable
from hf_paged.speculation.proposal import MOST_NODES, Proposal

NEAR = 4  # rows that differ by so many steps may end in any order
FAR = 16  # and by this part of what is left of them
MARGIN = 1.04  # a step with drafts must promise so much more than one without
NODE = 15e-6  # seconds of a draft outside all forwards
SOME = 100e-6  # seconds that a step's overhead may have, whatever it was before
SIZES = (1, 2, 4, 8, 16, 32, 64)  # numbers of drafts that stand for all
AHEAD = 4  # depths that are looked ahead: the first may pay only with those behind it


@dataclass(eq=False)
class Overhead:
    """Seconds of a step outside all forwards, all of which follow slowly.

    Attributes:
        step: of any step. drafts: of one with drafts besides. after: by which the forward behind such a step is longer.
        node: of each draft.
    """

    step: float = 0.0
    drafts: float = 0.0
    after: float = 0.0
    node: float = NODE

    def note(self, seconds: float, nodes: int) -> None:
        """Add a step's, in which `nodes` drafts were verified."""
        if nodes:
            self.drafts = _follow(self.drafts, max(seconds - self.step - self.node * nodes, 0.0))
        else:
            self.step = _follow(self.step, seconds)

    def note_after(self, seconds: float, usual: float) -> None:
        """Add a forward behind a step with drafts, and what it would usually take."""
        missed = min(max(seconds / usual - 1, -STRAY), STRAY) * usual
        self.after = max(self.after + (missed - self.after) / 16, 0.0)

    def seconds(self, nodes: float) -> float:
        """Of a step with so many drafts, what it does to the next one included."""
        return self.step + (self.drafts + self.after + self.node * nodes if nodes else 0.0)


def _follow(known: float, seen: float) -> float:
    """A step may stumble, as the first one does: it counts as four times what is known at most, and less than a quicker
    one. Next to nothing is no measure of what is much."""
    return known + (min(seen, max(4 * known, SOME)) - known) / (16 if seen > known else 4) if known else seen


@dataclass(eq=False)
class Ledger:
    """One step's expectations. `tokens` are computed and `drawn` rows draw without any drafts.

    Attributes:
        cost: of forwards of about so many rows. decodes: of a token a row, of any number of rows; None: as `cost`.
        reaches: of the drafts that a model has made so far. spent: seconds of drafting so far.
    """

    cost: CostTable
    overhead: Overhead
    tokens: int
    drawn: int
    decodes: CostTable | None = None
    reaches: list[float] = field(default_factory=list)
    spent: float = 0.0
    _seconds: dict[int, float] = field(default_factory=dict)

    def seconds(self, nodes: int) -> float:
        """Of the target's part of a step with so many drafts."""
        known = self._seconds.get(nodes)
        if known is None:
            known = self.cost.seconds(self.tokens + nodes) + self.overhead.seconds(nodes) + 1e-9
            self._seconds[nodes] = known
        return known

    def step(self, rows: int) -> float:
        """Seconds of a step that decodes so many rows; fewer than were ever measured take their share of that."""
        cost = self.decodes or self.cost
        least = min(cost.smallest, self.drawn)
        if rows < least:
            return rows / least * self.step(least)
        return cost.seconds(rows) + self.overhead.step

    def values(self, left: Sequence[float]) -> list[float]:
        """What a token of each row is worth, over what one is on average, where nobody waits for a row's place.

        The row that ends last must be quicker for all to be done sooner; one that ends first takes, when it is quicker
        by a step, no more than its own line out of one step. Rows with about as many steps `left` may end in any
        order.
        """
        order, mean, out = sorted(left), self.step(self.drawn) / self.drawn, []
        for own in left:
            near = max(NEAR, own / FAR)
            first, last = len(left) - bisect_right(order, own + near), len(left) - bisect_left(order, own - near)
            out.append((self.step(last) - self.step(first)) / (last - first) / mean)
        return out

    def plain(self) -> float:
        """Tokens a second without drafts."""
        return self.drawn / self.seconds(0)

    def best(self, reaches: Sequence[float], seconds: float = 0.0) -> tuple[float, int]:
        """How many of `reaches`, the largest first, to verify, and tokens a second then.

        Args:
            seconds: of drafting that is yet to be done.
        """
        spent, total = self.spent + seconds, float(self.drawn)
        best, count = MARGIN * total / (self.seconds(0) + spent), 0
        for n, reach in enumerate(reaches, 1):
            total += reach
            if n <= 16 or n % 4 == 0 or n == len(reaches):
                rate = total / (self.seconds(n) + spent)
                if rate > best:
                    best, count = rate, n
        return best, count

    @cached_property
    def cheapest(self) -> float:
        """Least reach at which a draft of this step may be worth its place: where more of them cost the least."""
        usual = self.seconds(0)
        return min((self.seconds(nodes) - usual) / nodes for nodes in SIZES) * self.plain()

    def worth(self) -> float:
        """Least reach of a single draft that raises the rate."""
        rate, count = self.best(sorted(self.reaches, reverse=True))
        return (self.seconds(count + 4) - self.seconds(count)) / 4 * rate


@dataclass(eq=False)
class Guide:
    """Tells a draft model when to stop, and which of its drafts are worth verifying.

    Attributes:
        ledger: of the step; None: everything is drafted, as deep and wide as it may be.
        width: most drafts beside each other, a row.
        threshold: least probability that the draft model must give.
        records: of the rows. values: what a token of each is worth; where none is given, 1.
    """

    source: str
    acceptance: Acceptance
    ledger: Ledger | None
    draft_cost: CostTable
    width: int
    threshold: float = 0.0
    records: dict[PlanRow, RowRecord] = field(default_factory=dict)
    values: Mapping[PlanRow, float] = field(default_factory=dict)

    def value(self, row: PlanRow) -> float:
        """What reaching the first draft of `row` is worth: reaches begin with it."""
        return self.values.get(row, 1.0)

    def odds(self, row: PlanRow, kind: int, depth: int, prior: float) -> float:
        """Odds of a draft of `row`."""
        return self.acceptance.odds(self.source, kind, depth, prior, self.records[row])

    def least(self) -> float:
        """Drafts that are reached more rarely are not worth their place in the forward."""
        return self.ledger.worth() if self.ledger is not None else 0.0

    def add(self, reaches: Sequence[float]) -> None:
        """Drafts of these reaches were made."""
        if self.ledger is not None:
            self.ledger.reaches += reaches

    def least_before(self, depth: int) -> float:
        """Drafts that are reached more rarely are not worth that one at `depth` is made behind them."""
        return self.least() / self.acceptance.any_odds(self.source, depth)

    def least_of_chain(self) -> float:
        """Drafts of one row that are reached more rarely are not worth that another one is made behind them."""
        another = self.draft_cost.seconds(1) * self.ledger.plain()
        return (self.ledger.worth() + another) / self.acceptance.any_odds(self.source, 2)

    def goes_on(self, depth: int, reaches: Sequence[float], deepest: int) -> bool:
        """Whether drafts at `depth`, 2 or more, are to be made behind drafts of these reaches. (See `Trial` for 1.)"""
        if not reaches:
            return False
        if self.ledger is None:
            return True
        made = sorted(self.ledger.reaches, reverse=True)
        now, _ = self.ledger.best(made)
        seconds, ahead = 0.0, list(reaches)
        for further in range(depth, min(depth + AHEAD, deepest + 1)):
            seconds += self.draft_cost.seconds(len(reaches))
            odds = self.acceptance.any_odds(self.source, further)
            ahead = [reach * odds for reach in ahead]
            made = sorted(made + ahead, reverse=True)
            if self.ledger.best(made, seconds)[0] > now:
                return True
        return False


def choose(
    offers: Mapping[PlanRow, Proposal], values: Mapping[PlanRow, float], ledger: Ledger | None, budget: int
) -> tuple[dict[PlanRow, Proposal], float]:
    """The drafts that are worth their place, over all rows: those with the best odds first.

    Args:
        values: what a token of a row is worth, where that is not 1. ledger: None: all do. budget: most of them.

    Returns:
        them, and how many of them are expected to be taken.
    """
    nodes = [
        (reach * values.get(planned, 1.0), -index, planned, reach)
        for planned, proposal in offers.items()
        for index, reach in enumerate(proposal.reach()[:MOST_NODES])
    ]
    nodes.sort(key=lambda node: (-node[0], -node[1]))
    count = budget if ledger is None else min(ledger.best([worth for worth, _, _, _ in nodes])[1], budget)
    chosen: dict[PlanRow, set[int]] = {}
    for _, index, planned, _ in nodes[:count]:
        chosen.setdefault(planned, set()).add(-index)
    picked = {planned: offers[planned].only(indices) for planned, indices in chosen.items()}
    return picked, sum(reach for _, _, _, reach in nodes[:count])
