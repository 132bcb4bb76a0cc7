"""How much drafting pays: expected tokens against measured seconds.

A step with drafts makes `drawn + sum(reach)` tokens, where `reach` is a draft's odds of being taken, in the time of the
forward over all of them and of the drafting. What is added must raise the quotient; zero is an allowed answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_paged.plan import PlanRow
from hf_paged.speculation.acceptance import Acceptance, RowRecord
from hf_paged.speculation.cost import CostTable

MARGIN = 1.01  # a step with drafts must promise so much more than one without
NODE = 15e-6  # seconds of a draft outside all forwards
AHEAD = 4  # depths that are looked ahead: the first may pay only with those behind it


@dataclass(eq=False)
class Overhead:
    """Seconds of a step outside all forwards: of any step, and of one with drafts besides; both follow slowly."""

    step: float = 0.0
    drafts: float = 0.0

    def note(self, seconds: float, nodes: int) -> None:
        """Add a step's, in which `nodes` drafts were verified."""
        if nodes:
            self.drafts = _follow(self.drafts, max(seconds - self.step - NODE * nodes, 0.0))
        else:
            self.step = _follow(self.step, seconds)

    def seconds(self, nodes: float) -> float:
        """Of a step with so many drafts."""
        return self.step + (self.drafts + NODE * nodes if nodes else 0.0)


def _follow(known: float, seen: float) -> float:
    """A step may stumble, as the first one does: it counts as four times what is known at most, and less than a quicker
    one."""
    return known + (min(seen, 4 * known) - known) / (16 if seen > known else 4) if known else seen


@dataclass(eq=False)
class Ledger:
    """One step's expectations. `tokens` are computed and `drawn` rows draw without any drafts.

    Attributes:
        reach: sum over the drafts that are planned. nodes: how many they are. spent: seconds of drafting so far.
    """

    cost: CostTable
    overhead: Overhead
    tokens: int
    drawn: int
    reach: float = 0.0
    nodes: int = 0
    spent: float = 0.0

    def rate(self, reach: float = 0.0, nodes: int = 0, seconds: float = 0.0) -> float:
        """Tokens a second with so many drafts more."""
        nodes += self.nodes
        whole = self.cost.seconds(self.tokens + nodes) + self.overhead.seconds(nodes)
        return (self.drawn + self.reach + reach) / (whole + self.spent + seconds + 1e-9)

    def plain(self) -> float:
        """Tokens a second without drafts."""
        return self.drawn / (self.cost.seconds(self.tokens) + self.overhead.seconds(0) + 1e-9)

    def worth(self) -> float:
        """Least reach of a single draft that raises the rate."""
        step = self.cost.seconds(self.tokens + self.nodes + 4) - self.cost.seconds(self.tokens + self.nodes)
        return (step / 4 + NODE) * self.rate()

    def choose(self, reaches: Sequence[float]) -> int:
        """How many of `reaches`, the largest first, to verify."""
        best, count, total = self.rate() * MARGIN, 0, 0.0
        for n, reach in enumerate(reaches, 1):
            total += reach
            if n <= 16 or n % 4 == 0 or n == len(reaches):
                rate = self.rate(total, n)
                if rate > best:
                    best, count = rate, n
        return count


@dataclass(eq=False)
class Guide:
    """Tells a draft model when to stop, and which of its drafts are worth verifying.

    Attributes:
        ledger: of the step; None: everything is drafted, as deep and wide as it may be.
        width: most drafts beside each other, a row.
        threshold: least probability that the draft model must give.
    """

    source: str
    acceptance: Acceptance
    ledger: Ledger | None
    draft_cost: CostTable
    width: int
    threshold: float = 0.0
    records: dict[PlanRow, RowRecord] = field(default_factory=dict)

    def odds(self, row: PlanRow, kind: int, depth: int, prior: float) -> float:
        """Odds of a draft of `row`."""
        return self.acceptance.odds(self.source, kind, depth, prior, self.records[row])

    def least(self) -> float:
        """Drafts that are reached more rarely are not worth their place in the forward."""
        return self.ledger.worth() if self.ledger is not None else 0.0

    def goes_on(self, depth: int, reaches: Sequence[float], nodes: int, deepest: int) -> bool:
        """Whether drafts at `depth`, 2 or more, are to be made behind drafts of these reaches. (See `Trial` for 1.)

        Args:
            nodes: tokens that the draft model must compute for it.
        """
        if not reaches:
            return False
        if self.ledger is None:
            return True
        now = self.ledger.rate()
        gain, seconds, added, reach = 0.0, 0.0, 0, sum(reaches)
        for further in range(depth, min(depth + AHEAD, deepest + 1)):
            seconds += self.draft_cost.seconds(nodes if further == depth else len(reaches))
            reach *= self.acceptance.any_odds(self.source, further)
            gain, added = gain + reach, added + len(reaches)
            if self.ledger.rate(gain, added, seconds) > now:
                return True
        return False
