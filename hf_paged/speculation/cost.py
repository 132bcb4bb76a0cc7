"""What a forward costs by how many tokens it computes, as measured while forwards run."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from math import log2

KEPT = 9  # measurements of one size; their median counts, so that a machine that stumbles once changes nothing
EXACT = 16  # sizes up to this one are kept apart; larger ones in steps of an eighth of an octave


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
        """Medians in order of size. More tokens never cost less: noise that says so is evened out upwards."""
        points = sorted(
            (tokens, sorted(times)[(len(times) - 1) // 2]) for times, tokens in self._seen.values() if times
        )
        self._sizes, self._seconds, most = [], [], 0.0
        for size, seconds in points:
            most = max(most, seconds)
            self._sizes.append(size)
            self._seconds.append(most)

    def seconds(self, tokens: float) -> float:
        """What a forward over `tokens` tokens should take.

        Beyond what was measured it goes on as between the last two sizes; where only one is known, a token more costs a
        twentieth of that: what is not known is tried.
        """
        sizes, seconds = self._sizes, self._seconds
        if not sizes or tokens <= 0:
            return 0.0
        at = bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return seconds[at]
        if len(sizes) == 1:
            return seconds[0] * (1 + max(tokens - sizes[0], 0) / sizes[0] / 20)
        if at == 0:
            return seconds[0]
        low = min(at, len(sizes) - 1) - 1
        slope = (seconds[low + 1] - seconds[low]) / (sizes[low + 1] - sizes[low])
        return seconds[low] + slope * (tokens - sizes[low])

    def points(self) -> list[tuple[float, float]]:
        """Sizes and seconds, for show."""
        return list(zip(self._sizes, self._seconds, strict=True))
