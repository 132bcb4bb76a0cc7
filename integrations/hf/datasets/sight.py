"""What a run looks like at a moment, and over time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

MOST_SAMPLES = 1000
RECENT_SECONDS = 30.0


@dataclass(frozen=True)
class Glance:
    """A run at a moment.

    Attributes:
        seconds: since it began.
        written: rows in the output, those of earlier runs included. failed: of them, with an error.
        total: rows that there will be; None where that is not known.
        tokens_per_second: generated, of late. seconds_left: None where that is not known.
        hit_rate: share of the prompts' tokens found in the prefix cache, 0 to 1.
        acceptance: share of drafts taken, 0 to 1; None: nobody drafts.
        kv_use: share of the pool's pages that rows hold, 0 to 1. batch: rows a step, of late. in_flight: rows queued.
    """

    seconds: float
    written: int
    failed: int
    total: int | None
    tokens_per_second: float
    rows_per_second: float
    seconds_left: float | None
    hit_rate: float
    acceptance: float | None
    kv_use: float
    batch: float
    in_flight: int


class Reporter(Protocol):
    """Told where a run is: at its beginning, about twice a second, and at its end."""

    def begin(self, glance: Glance) -> None: ...

    def update(self, glance: Glance) -> None: ...

    def end(self, glance: Glance) -> None: ...


class Sight:
    """Looks at an engine now and then, and keeps what it saw in a bounded list.

    Args:
        engine: whose counters were reset when the run began.
        total: rows that this process will have in its output, those `before` it included.
    """

    def __init__(self, engine: Any, total: int | None, before: int) -> None:
        self.engine, self.total, self.before = engine, total, before
        self.begun = time.perf_counter()
        self.samples: list[Glance] = []
        self._keep_every, self._looks = 1, 0
        self._recent: deque[tuple[float, int, int, int, int]] = deque([(0.0, 0, 0, 0, before)])

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.begun

    def look(self, written: int, failed: int, in_flight: int) -> Glance:
        """The run now."""
        stats, seconds = self.engine.stats(), self.seconds
        self._recent.append((seconds, stats.generated_tokens, stats.rows, stats.steps, written))
        while len(self._recent) > 2 and self._recent[0][0] < seconds - RECENT_SECONDS:
            self._recent.popleft()
        then, tokens, rows, steps, rows_then = self._recent[0]
        last = self._recent[-2]
        spent, rate = max(seconds - then, 1e-9), (written - rows_then) / max(seconds - then, 1e-9)
        left = None if self.total is None or not rate else max(0, self.total - written) / rate
        drafted = self.engine.speculation_stats() if self.engine.speculator is not None else None
        glance = Glance(
            seconds,
            written,
            failed,
            self.total,
            (stats.generated_tokens - tokens) / spent,
            rate,
            left,
            stats.hit_rate,
            None if drafted is None else drafted.accepted / max(1, drafted.proposed),
            1 - stats.pages_free / max(1, stats.pages_total),
            (stats.rows - last[2]) / max(1, stats.steps - last[3]),
            in_flight,
        )
        self._keep(glance, (stats.generated_tokens - last[1]) / max(seconds - last[0], 1e-9))
        return glance

    def _keep(self, glance: Glance, rate_now: float) -> None:
        """Keep one look in so many; when there are too many, every other one goes."""
        self._looks += 1
        if self._looks % self._keep_every == 0:
            self.samples.append((glance.seconds, rate_now, glance.batch, glance.kv_use, glance.written))
        if len(self.samples) > MOST_SAMPLES:
            self.samples = self.samples[1::2]
            self._keep_every *= 2
