"""What a forward costs by how many tokens it computes, as measured while forwards run."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from math import log2

KEPT = 9  # measurements of one size; their median counts, so that a machine that stumbles once changes nothing
KNOWN = 3  # measurements of a size before they count: one that stumbled would bar it for good
EXACT = 16  # sizes up to this one are kept apart; larger ones in steps of an eighth of an octave


def _usual(times: deque[float]) -> float:
    return min(times) if len(times) < 5 else sorted(times)[len(times) // 2]


class CostTable:
    """Seconds of a forward over so many tokens: medians where it was measured, straight lines between."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[deque[float], int]] = {}
        self._sizes: list[int] = []
        self._seconds: list[float] = []
        self._notes = 0

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def note(self, tokens: int, seconds: float) -> None:
        """Add a measurement. The first of a size is passed over: much is done there once."""
        bucket = tokens if tokens <= EXACT else EXACT + int(8 * (log2(tokens) - log2(EXACT))) + 1
        times, seen = self._seen.get(bucket) or (deque(maxlen=KEPT), 0)
        self._seen[bucket] = times, tokens
        if seen:
            times.append(seconds)
            self._notes += 1
            if len(times) < KEPT or self._notes % KEPT == 0:
                self._settle()

    def _settle(self) -> None:
        """Seconds in order of size: medians, but the least of a few. A smaller size never costs more than a larger one:
        noise that says so is evened out downwards, so that one bad measurement bars nothing for good."""
        seen = [entry for entry in self._seen.values() if len(entry[0]) >= KNOWN] or self._seen.values()
        points = sorted((size, _usual(times)) for times, size in seen if times)
        self._sizes = [size for size, _ in points]
        least, self._seconds = float("inf"), []
        for _, seconds in reversed(points):
            least = min(least, seconds)
            self._seconds.append(least)
        self._seconds.reverse()

    def seconds(self, tokens: float) -> float:
        """What a forward over `tokens` tokens should take.

        Beyond what was measured a token more costs a twentieth of what one did up to there: what is not known is tried.
        """
        sizes, seconds = self._sizes, self._seconds
        if not sizes or tokens <= 0:
            return 0.0
        at = bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return seconds[at]
        if at == len(sizes):
            return seconds[-1] * (1 + (tokens - sizes[-1]) / sizes[-1] / 20)
        if at == 0:
            return seconds[0]
        slope = (seconds[at] - seconds[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + slope * (tokens - sizes[at - 1])

    def points(self) -> list[tuple[float, float]]:
        """Sizes and seconds, for show."""
        return list(zip(self._sizes, self._seconds, strict=True))
