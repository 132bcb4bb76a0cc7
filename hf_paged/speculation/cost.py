"""What a forward costs by how many tokens it computes, as measured while forwards run."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from math import log2

KEPT = 15  # measurements of one size; their median counts, so that a machine that stumbles once changes nothing
KNOWN = 3  # measurements of a size before they count: one that stumbled would bar it for good
LATEST = 9  # forwards that say what the machine's pace is now
LONG = 64  # tokens of a forward whose time a token is that of a large one
EXACT = 16  # sizes up to this one are kept apart; larger ones in steps of an eighth of an octave


def _usual(times: deque[float]) -> float:
    return min(times) if len(times) < 5 else sorted(times)[len(times) // 2]


class CostTable:
    """Seconds of a forward over so many tokens: medians where it was measured, straight lines between.

    A machine that is shared is quicker at one time than at another, and sizes are not measured at the same times. So
    what is kept is measured against the table itself: how much slower the machine is now than the table has it is what
    the latest forwards of any size say, and is taken out. A row of forwards of one size says that alone: were its own
    seconds to follow, too, both would drift, and sizes that are not measured meanwhile would seem dear for good.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=LATEST)  # of the latest forwards: seconds over those of the table
        self._pace = 1.0  # their median
        self._last = 0
        self._seen: dict[int, tuple[deque[float], int]] = {}
        self._sizes: list[int] = []
        self._seconds: list[float] = []
        self._notes = 0
        self._prompts: deque[float] = deque(maxlen=LATEST)  # seconds a token of forwards that read prompts

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def note(self, tokens: int, seconds: float) -> None:
        """Add a measurement. The first of a size is passed over: much is done there once."""
        bucket = tokens if tokens <= EXACT else EXACT + int(8 * (log2(tokens) - log2(EXACT))) + 1
        times, seen = self._seen.get(bucket) or (deque(maxlen=KEPT), 0)
        self._seen[bucket] = times, tokens
        alone, self._last = bucket == self._last, bucket
        if not seen:
            return
        if len(times) >= KNOWN:
            self._ratios.append(seconds / max(self._at(tokens), 1e-9))
            self._pace = sorted(self._ratios)[len(self._ratios) // 2]
        if alone and len(times) == KEPT:
            return
        times.append(seconds / self._pace)
        self._notes += 1
        if len(times) < KEPT or self._notes % KEPT == 0:
            self._settle()

    def note_prompt(self, tokens: int, seconds: float) -> None:
        """Add a forward that read prompts: it says what sizes beyond those that are measured may cost."""
        if tokens >= LONG:
            self._prompts.append(seconds / tokens)

    def _settle(self) -> None:
        """Seconds in order of size: medians, but the least of a few. A smaller size never costs more than a larger one:
        where noise says so, these share a mean (isotonic regression), in which what was measured often counts more."""
        seen = [entry for entry in self._seen.values() if len(entry[0]) >= KNOWN] or self._seen.values()
        points = sorted((size, _usual(times), len(times)) for times, size in seen if times)
        self._sizes = [size for size, _, _ in points]
        runs: list[tuple[float, float, int]] = []  # sum, weight and sizes of those that share a mean
        for _, seconds, weight in points:
            runs.append((seconds * weight, weight, 1))
            while len(runs) > 1 and runs[-2][0] * runs[-1][1] > runs[-1][0] * runs[-2][1]:
                last = runs.pop()
                runs[-1] = tuple(a + b for a, b in zip(runs[-1], last, strict=True))
        self._seconds = [total / weight for total, weight, count in runs for _ in range(count)]

    def seconds(self, tokens: float) -> float:
        """What a forward over `tokens` tokens should take now.

        Beyond what was measured a token more costs what one of a prompt does; where none was read, a twentieth of what
        one did up to there: what is not known is tried.
        """
        return self._at(tokens) * self._pace if self._sizes and tokens > 0 else 0.0

    def _at(self, tokens: float) -> float:
        sizes, seconds = self._sizes, self._seconds
        at = bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return seconds[at]
        if at == len(sizes):
            more = _usual(self._prompts) if self._prompts else seconds[-1] / sizes[-1] / 20
            return seconds[-1] + (tokens - sizes[-1]) * more
        if at == 0:
            return seconds[0]
        slope = (seconds[at] - seconds[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + slope * (tokens - sizes[at - 1])

    def points(self) -> list[tuple[float, float]]:
        """Sizes and seconds, for show."""
        return [(size, seconds * self._pace) for size, seconds in zip(self._sizes, self._seconds, strict=True)]
