"""How often drafts are taken: by proposer, by how sure it was, by depth, and row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_paged.speculation.proposal import Verdict

DECAY = 0.998  # of what was seen before, at every draft that is judged
TRUST = 6.0  # drafts that a proposer's own estimate is worth
ROW_DECAY, ROW_TRUST = 0.9, 4.0
DEPTHS = 3  # deeper drafts are alike
ANY = -1  # in place of a kind: whichever draft of a depth
LEAST, MOST = 0.01, 0.985


@dataclass(eq=False, slots=True)
class RowRecord:
    """Drafts of one proposer that were taken of one row, and how many were expected to be; both decay."""

    taken: float = 0.0
    expected: float = 0.0

    @property
    def ratio(self) -> float:
        return (self.taken + ROW_TRUST) / (self.expected + ROW_TRUST)


@dataclass(eq=False)
class Acceptance:
    """Odds that a draft is taken whose parent was.

    A proposer sorts its drafts into `kinds`, small numbers that stand for how sure it is; what came of drafts of that
    kind and depth tells the odds of the next.
    """

    _seen: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def odds(self, source: str, kind: int, depth: int, prior: float, row: RowRecord | None = None) -> float:
        """Odds of a draft at `depth` (1: the first), which its proposer takes for `prior`."""
        seen = self._seen.get((source, kind, min(depth, DEPTHS)))
        odds = prior if seen is None else (seen[0] + TRUST * prior) / (seen[1] + TRUST)
        if row is not None:
            odds *= row.ratio
        return min(max(odds, LEAST), MOST)

    def any_odds(self, source: str, depth: int) -> float:
        """Odds that one of the drafts at `depth` is taken, once one before them was."""
        return self.odds(source, ANY, depth, 0.7)

    def note(self, verdict: Verdict, row: RowRecord) -> None:
        """Learn from what the target made of a proposal."""
        proposal, depths = verdict.proposal, verdict.proposal.depths()
        row.taken *= ROW_DECAY
        row.expected *= ROW_DECAY
        for index, taken in verdict.judged():
            self._add(proposal.source, proposal.kinds[index], depths[index], taken)
            row.taken += taken
            row.expected += proposal.odds[index]
        for depth in range(1, min(max(depths), verdict.deepest) + 1):
            self._add(proposal.source, ANY, depth, depth <= verdict.accepted)

    def forget(self, source: str) -> None:
        """Nothing is known of this proposer."""
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != source}

    def _add(self, source: str, kind: int, depth: int, taken: bool) -> None:
        seen = self._seen.setdefault((source, kind, min(depth, DEPTHS)), [0.0, 0.0])
        seen[0], seen[1] = seen[0] * DECAY + taken, seen[1] * DECAY + 1
