"""Whether drafting pays, by trying: tokens a second with and without it, for batches of like size.

Estimates of odds and costs say how deep to draft; that drafting never makes a batch slower rests on what was measured
from end to end. A few steps now and then do what the others do not, and are held against the steps just before them:
a machine's speed drifts by more than what is to be found out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

TRIED = 6  # steps of a trial
LEAST = 4  # of these, steps that were like others: else it goes on
SHORT, LONG = 12, 768  # steps between trials: more as long as the same turns out to be faster
TRIALS = 5  # the latest; their median counts
MARGIN = 1.08  # what drafting must gain: the draft model has prompts to read, too, which trials do not show


@dataclass(eq=False)
class Batch:
    """What is known of batches of one size.

    Attributes:
        gains: of the latest trials: tokens a second with drafts over those without.
        best: whether to draft. trying: whether this phase does the other.
        left: steps of the phase. span: steps between trials.
        seen: tokens and seconds of the phase's latest steps. before: tokens a second before the trial.
        fresh: whether the phase has just begun, and the draft model catches up.
    """

    gains: deque[float] = field(default_factory=lambda: deque(maxlen=TRIALS))
    best: bool = False
    trying: bool = False
    left: int = TRIED
    span: int = SHORT
    seen: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=2 * TRIED))
    before: float = 0.0
    fresh: bool = False

    @property
    def mode(self) -> bool:
        """Whether this phase drafts."""
        return self.best != self.trying

    def turn(self) -> None:
        """The next phase."""
        if len(self.seen) < LEAST:
            self.left = TRIED
            return
        rate, mode = sum(tokens for tokens, _ in self.seen) / sum(seconds for _, seconds in self.seen), self.mode
        if self.trying:
            self._conclude(rate)
        else:
            self.before, self.trying, self.left = rate, True, TRIED
        self.fresh = self.mode != mode
        if self.fresh:
            self.seen.clear()

    def _conclude(self, rate: float) -> None:
        """A trial has ended."""
        self.gains.append(self.before / rate if self.best else rate / self.before)
        best = median(self.gains) > MARGIN
        self.span = min(4 * self.span, LONG) if best == self.best else SHORT
        self.best, self.trying, self.left = best, False, self.span


class Trial:
    """Says for each step whether a draft model is to draft."""

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self._now: Batch | None = None

    def drafts(self, rows: int) -> bool:
        """Whether the next step drafts, of so many rows."""
        self._now = batch = self._batches.setdefault(rows.bit_length(), Batch())
        if not batch.left:
            batch.turn()
        batch.left -= 1
        return batch.mode

    def note(self, tokens: int, seconds: float) -> None:
        """What the step that was asked about made. `seconds` of one that is not like the others: 0."""
        batch, self._now = self._now, None
        if batch is None or not seconds:
            return
        if batch.fresh:
            batch.fresh = False
            return
        batch.seen.append((tokens, seconds))
