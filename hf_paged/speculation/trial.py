"""Whether drafting pays, by trying: tokens a second with and without it, for batches of like size.

Estimates of odds and costs say how deep to draft; that drafting never makes a batch slower rests on what was measured
from end to end. Most steps do what was faster, a few now and then do the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIED = 6  # steps of a trial
SHORT, LONG = 48, 768  # steps between trials: more as long as the same turns out to be faster
DECAY = 0.97
MARGIN = 1.04  # what drafting must gain: the draft model has prompts to read, too


@dataclass(eq=False)
class Batch:
    """What is known of batches of one size.

    Attributes:
        sums: with drafts and without: tokens and seconds of the latest steps.
        mode: whether this phase drafts. left: its steps. span: steps between trials.
        best: what was faster, None at first. fresh: whether the phase has just begun, and the draft model catches up.
    """

    sums: dict[bool, list[float]] = field(default_factory=lambda: {True: [0.0, 0.0], False: [0.0, 0.0]})
    mode: bool = False
    left: int = TRIED
    span: int = SHORT
    best: bool | None = None
    fresh: bool = True

    def rate(self, mode: bool) -> float:
        tokens, seconds = self.sums[mode]
        return tokens / seconds if seconds else 0.0

    def turn(self) -> None:
        """The next phase."""
        before = self.mode
        if all(seconds for _, seconds in self.sums.values()):
            faster = self.rate(True) > self.rate(False) * MARGIN
            if self.mode == self.best:
                self.mode, self.left = not faster, TRIED
            else:  # a trial has ended
                self.span = min(4 * self.span, LONG) if faster == self.best else SHORT
                self.mode, self.left = faster, self.span
            self.best = faster
        else:
            self.mode, self.left = not self.mode, TRIED
        self.fresh = self.mode != before


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
        sums = batch.sums[batch.mode]
        sums[0], sums[1] = sums[0] * DECAY + tokens, sums[1] * DECAY + seconds
