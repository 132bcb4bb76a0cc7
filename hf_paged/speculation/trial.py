"""Whether drafting pays, by trying, for batches of like size.

Estimates of odds and costs say how deep to draft; that drafting never makes a batch slower rests on what steps with
drafts really take. A few steps now and then do what the others do not. How many drafts a step takes varies by far more
than what is to be found out, and so does a shared machine's speed: tokens are counted as expected (`Speculator` holds
expectations against what came), and seconds over those of a step without drafts at the machine's present pace; and not
the latest trial decides, but all of the latest steps of both kinds. One that fails where costs and odds had promised no
more is believed at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from statistics import median, median_low

TRIED, FEWER = 6, 3  # steps of a trial; of one with several rows, which say more at a time
SHORT, LONG, GROWTH = 12, 384, 8  # steps between trials: more as long as the same turns out to be faster
KEPT = 48  # steps of a kind that count
MARGIN = 1.05  # what a draft model must gain: it has prompts to read, too, which trials do not show
SURE = 4  # trials after which what was seen can be relied on
# Then so many steps without drafts for each that the draft model spent on catching up, of at most so many.
PAYING, DEAREST = 100, 40
SETTLED = 150  # the same once that can be relied on
FARTHER = 10  # either is so many times more for all that drafts cost more than they gained
STUMBLE = 1.5  # a step counts as so many times the usual one at most, unless the draft model read prompts in it

Tried = tuple[float, float, bool]  # tokens and seconds of a step, and whether the draft model read prompts


@dataclass(eq=False)
class Batch:
    """What is known of batches of one size.

    Attributes:
        tried: steps of a trial; most of them must be like others, else it goes on.
        seen: of the latest steps without and with drafts of the model: tokens over those of a step without any drafts,
            seconds over its, and whether the draft model read prompts in it.
        best: whether to draft. trying: whether this phase does the other.
        left: steps of the phase. span: steps between trials.
        noted: steps of this phase that count. fresh: whether the draft model has yet to catch up.
        settled: whether it is one that could rely on it that drafts do not pay.
        tolls: what that took the latest times, in steps without drafts.
        promise: tokens a second with drafts over those without, as costs and odds have it.
    """

    tried: int
    seen: tuple[deque[Tried], deque[Tried]] = field(default_factory=lambda: (deque(maxlen=KEPT), deque(maxlen=KEPT)))
    best: bool = False
    trying: bool = False
    left: int = 0
    span: int = SHORT
    noted: int = 0
    fresh: bool = False
    settled: bool = False
    tolls: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    promise: float = inf

    @property
    def mode(self) -> bool:
        """Whether this phase drafts."""
        return self.best != self.trying

    def gain(self) -> float:
        """Tokens a second with drafts over those without."""
        without, drafted = map(_rate, self.seen)
        return drafted / without

    def _sure(self) -> float:
        """How far what was seen of drafts can be relied on: after a first trial it may have been chance."""
        gain = self.gain()
        if max(self.promise, gain) < 1:
            return 1.0
        worse = max(1 - gain * self.promise, 0.0)  # than where the one is as much above 1 as the other is below it
        return min(len(self.seen[True]) / (SURE * self.tried) * (1 + FARTHER * worse), 1.0)

    def _rest(self) -> int:
        """Steps until the next trial, after one that found that drafts do not pay."""
        toll = median_low(self.tolls) if self.tolls else 0.0  # one of them may have stumbled
        sure, worse = self._sure(), max(1 - self.gain(), 0.0)
        times = sure * PAYING if sure < 1 else SETTLED * (1 + FARTHER * worse)
        return max(self.span, int(times * min(toll, DEAREST)))

    def turn(self) -> None:
        """The next phase."""
        if self.noted <= self.tried // 2:
            self.left = self.tried
            return
        mode = self.mode
        if self.trying:
            best = self.gain() > MARGIN
            self.span = min(GROWTH * self.span, LONG) if best == self.best else SHORT
            self.best, self.trying = best, False
            self.left = self.span if best else self._rest()
            self.settled = not best and self._sure() == 1
        elif self.seen[True] and not (self.best or self.settled) and self._sure() == 1:
            # Costs and odds have come to say so, too: no other trial is made to be sure of it.
            self.left, self.settled = self._rest(), True
        else:
            self.trying, self.left = True, self.tried
        self.noted, self.fresh = 0, self.mode and not mode

    def add(self, tokens: float, cost: float, reads: bool) -> None:
        """A step of this phase."""
        self.seen[self.mode].append((tokens, cost, reads))
        self.noted += 1
        if self.best and not self.trying and self.noted % KEPT == 0 and self.gain() < 1:
            self.best, self.left, self.span, self.noted = False, SHORT, SHORT, 0


def _rate(steps: deque[Tried]) -> float:
    most = STUMBLE * median(cost for _, cost, _ in steps)
    return sum(tokens for tokens, _, _ in steps) / sum(cost if reads else min(cost, most) for _, cost, reads in steps)


class Trial:
    """Says for each step whether a draft model is to draft."""

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self._now: Batch | None = None
        self._last: Batch | None = None

    def drafts(self, rows: int, promise: Callable[[], float] | None = None) -> bool:
        """Whether the next step drafts, of so many rows.

        Args:
            promise: says how many more tokens a second there would be, as costs and odds have it.
        """
        size = rows.bit_length()
        self._now = self._last = batch = self._batches.setdefault(size, Batch(TRIED if size < 3 else FEWER))
        if not batch.left:
            batch.promise = promise() if promise is not None else inf
            batch.turn()
        batch.left -= 1
        return batch.mode

    def put_off(self) -> None:
        """The step that was asked about does not draft after all: a trial waits for other rows."""
        self._now.left += 1
        self._now = None

    @property
    def trying(self) -> bool:
        """Whether the step that was asked about is one of a trial, or comes before the first."""
        return self._now is not None and (self._now.trying or not self._now.seen[True])

    def idle(self, rows: int) -> bool:
        """Whether the next step, of so many rows, neither drafts nor belongs to a trial."""
        batch = self._batches.get(rows.bit_length())
        return batch is not None and batch.left > 0 and not (batch.mode or batch.trying)

    @property
    def left(self) -> int:
        """Steps behind the one that was asked about that will do the same."""
        return self._last.left if self._last is not None else 0

    def rested(self, steps: int) -> None:
        """So many steps were made, of the same rows, without asking: none of them drafted."""
        if self._last is not None and not self._last.mode:
            self._last.left = max(self._last.left - steps, 0)

    def note(self, tokens: float, cost: float, reads: bool = False, usual: float = inf) -> None:
        """What the step that was asked about came to.

        Args:
            tokens: over those of a step without drafts.
            cost: seconds over those of a step without drafts; 0 for a step that is not like the others.
            reads: whether the draft model read prompts in it, which it will do again for others.
            usual: what one without drafts costs among many of them, at most: the few of a trial take longer each.
        """
        batch, self._now = self._now, None
        if batch is None or not cost:
            return
        if batch.fresh:
            batch.fresh = False
            batch.tolls.append(cost)
        else:
            batch.add(tokens, cost if batch.mode else min(cost, usual), reads)
