"""What a forward costs by how many tokens it computes, as measured while forwards run."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from math import exp, inf, log, log2
from statistics import median

KNOWN = 3  # measurements of a size before they count, by their median: one that stumbled would bar it for good
FOLLOW = 0.6  # share of what a forward took more or less than expected that is put down to the machine's pace
SETTLED = 64  # measurements of a size after which a single one moves it as little as it ever will
OFTEN = 16  # measurements between two looks at what they make of the sizes
STRAY = 0.25  # a measurement counts as so far off at most, in powers of e: a machine stumbles now and then
LATEST = 9  # prompts that count
LONG = 64  # tokens of a forward whose time a token is that of a large one
EXACT = 16  # sizes up to this one are kept apart; larger ones in steps of an eighth of an octave


@dataclass(eq=False, slots=True)
class Size:
    """Forwards of one size: the seconds that they take at the usual pace, how many there were, and the first ones."""

    tokens: int
    count: int = 0
    seconds: float = inf
    first: list[float] = field(default_factory=list)


class CostTable:
    """Seconds of a forward over so many tokens: as measured, straight lines between.

    A machine that is shared is quicker at one time than at another, and sizes are not measured at the same times. So
    what a forward takes is its size's seconds times the machine's pace, and the factor by which it misses them moves
    both, the pace by far more. While forwards are of one size, its seconds thus move by a small share of how far the
    pace has moved since, however many they are: sizes that are not measured meanwhile do not seem dear or cheap for it.
    Nor do they where a forward takes longer because the one before was of another size: the next ones take that back.

    Attributes:
        pace: by which forwards take longer at present than they usually do.
        passed: seconds of all forwards that were measured, and what they would have taken at the usual pace.
    """

    def __init__(self, prompts: deque[float] | None = None) -> None:
        self.pace, self.passed = 1.0, (0.0, 0.0)
        self._seen: dict[int, Size] = {}
        self._sizes: list[int] = []
        self._seconds: list[float] = []
        self._notes = 0
        # Seconds a token of forwards that read prompts.
        self._prompts: deque[float] = deque(maxlen=LATEST) if prompts is None else prompts

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def note(self, tokens: int, seconds: float) -> None:
        """Add a measurement. The first of a size is passed over: much is done there once."""
        bucket = tokens if tokens <= EXACT else EXACT + int(8 * (log2(tokens) - log2(EXACT))) + 1
        size = self._seen.get(bucket)
        if size is None:
            self._seen[bucket] = Size(tokens)
            return
        size.tokens, usual = tokens, max(seconds, 1e-9) / self.pace
        if size.count < KNOWN:
            # The least of them would be too little, for which the pace, and with it every size to come, would make up.
            size.first.append(usual)
            size.seconds = median(size.first)
        else:
            missed = min(max(log(usual / size.seconds), -STRAY), STRAY)
            self.pace *= exp(FOLLOW * missed)
            size.seconds *= exp(missed / (2 * min(size.count, SETTLED)))
        size.count += 1
        self.passed = self.passed[0] + seconds, self.passed[1] + size.seconds
        self._notes += 1
        if size.count <= 2 * KNOWN or self._notes % OFTEN == 0:
            self._settle()

    def note_prompt(self, tokens: int, seconds: float) -> None:
        """Add a forward that read prompts: it says what sizes beyond those that are measured may cost."""
        if tokens >= LONG:
            self._prompts.append(seconds / tokens)

    def _settle(self) -> None:
        """Seconds in order of size. A smaller size never costs more than a larger one: where noise says so, these share
        a mean (isotonic regression), in which what was measured often counts more."""
        seen = [size for size in self._seen.values() if size.count]
        known = [size for size in seen if size.count >= KNOWN] or seen
        known.sort(key=lambda size: size.tokens)
        self._sizes = [size.tokens for size in known]
        runs: list[tuple[float, float, int]] = []  # sum, weight and sizes of those that share a mean
        for size in known:
            weight = min(size.count, SETTLED)
            runs.append((size.seconds * weight, weight, 1))
            while len(runs) > 1 and runs[-2][0] * runs[-1][1] > runs[-1][0] * runs[-2][1]:
                last = runs.pop()
                runs[-1] = tuple(a + b for a, b in zip(runs[-1], last, strict=True))
        self._seconds = [total / weight for total, weight, count in runs for _ in range(count)]

    def knows(self, tokens: int) -> bool:
        """Whether forwards over so few tokens have been measured, or over fewer: what more would cost is known."""
        return any(size.count >= KNOWN and size.tokens <= tokens for size in self._seen.values())

    def pace_since(self, passed: tuple[float, float]) -> float:
        """The mean pace since `passed` was what it says; the present one where nothing was measured since."""
        taken, usual = (now - before for now, before in zip(self.passed, passed, strict=True))
        return taken / usual if usual > 0 else self.pace

    def seconds(self, tokens: float, pace: float | None = None) -> float:
        """What a forward over `tokens` tokens should take now, or at a given pace.

        Beyond what was measured a token more costs what one of a prompt does; where none was read, a twentieth of what
        one did up to there: what is not known is tried.
        """
        pace = self.pace if pace is None else pace
        return self._at(tokens) * pace if self._sizes and tokens > 0 else 0.0

    def _at(self, tokens: float) -> float:
        sizes, seconds = self._sizes, self._seconds
        at = bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return seconds[at]
        if at == len(sizes):
            more = median(self._prompts) if self._prompts else seconds[-1] / sizes[-1] / 20
            return seconds[-1] + (tokens - sizes[-1]) * more
        if at == 0:
            return seconds[0]
        slope = (seconds[at] - seconds[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + slope * (tokens - sizes[at - 1])

    @property
    def smallest(self) -> int:
        """The least size that was measured; 0: none was."""
        return self._sizes[0] if self._sizes else 0

    def points(self, pace: float | None = None) -> list[tuple[float, float]]:
        """Sizes and seconds, for show: now, or at a given pace."""
        pace = self.pace if pace is None else pace
        return [(size, seconds * pace) for size, seconds in zip(self._sizes, self._seconds, strict=True)]


class StepCosts:
    """Seconds of the target's forwards: by rows, where nothing else is computed, and by tokens.

    So many tokens of many rows take longer than those of few, whose histories are read once for all drafts of a row:
    what a batch with drafts costs is told by batches of like size alone.

    Attributes:
        rows: forwards that decode, a token a row.
    """

    def __init__(self) -> None:
        self._prompts: deque[float] = deque(maxlen=LATEST)
        self.rows = CostTable(self._prompts)
        self._batches: dict[int, CostTable] = {}

    def of(self, rows: int) -> CostTable:
        """Forwards of about so many rows, by their tokens."""
        size = rows.bit_length()
        if size not in self._batches:
            self._batches[size] = CostTable(self._prompts)
        return self._batches[size]

    def note(self, rows: int, tokens: int, seconds: float) -> None:
        """Add a measurement of a forward over a token of each row, and over drafts."""
        self.of(rows).note(tokens, seconds)
        if tokens == rows:
            self.rows.note(tokens, seconds)

    def note_prompt(self, tokens: int, seconds: float) -> None:
        """See `CostTable.note_prompt`."""
        self.rows.note_prompt(tokens, seconds)
