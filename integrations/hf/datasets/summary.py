"""What came of a run, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN_ERRORS = 10


@dataclass
class Summary:
    """What a process did in a run.

    Attributes:
        out: the directory. finished: whether all rows are written.
        rows: rows written by this process now. rows_before: its rows that were there.
        failed, failed_before: of these, those with an error; `errors` counts the most frequent messages of `failed`.
        generated_tokens, prompt_tokens, cached_tokens: of `rows`; the last are prompt tokens found in the prefix cache.
        draft_tokens, accepted_tokens: drafts that were verified, and those taken.
        seconds: from the first row to the last. engine_seconds: of these, in the engine's steps.
        steps: forwards of the model; mean_batch: rows in one. peak_batch: most rows at once.
        preemptions: rows that gave up their pages.
        kv_peak_bytes: pages in use at the peak.
        timeline: lists of one length: seconds, tokens_per_second, batch, kv_use (0 to 1), written.
    """

    out: str
    finished: bool = False
    rows: int = 0
    rows_before: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    engine_seconds: float = 0.0
    steps: int = 0
    peak_batch: int = 0
    mean_batch: float = 0.0
    preemptions: int = 0
    kv_peak_bytes: int = 0
    timeline: dict[str, list[float]] = field(default_factory=dict)
    failed_before: int = 0

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that the prefix cache had, 0 to 1."""
        return self.cached_tokens / max(1, self.cached_tokens + self.prompt_tokens)

    @property
    def acceptance(self) -> float | None:
        """Share of drafts taken, 0 to 1; None: nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def outside_engine(self) -> float:
        """Share of the time outside the engine's steps, 0 to 1."""
        return 1 - self.engine_seconds / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = ("rows_per_second", "tokens_per_second", "hit_rate", "acceptance", "outside_engine")
        return asdict(self) | {name: getattr(self, name) for name in names}


TIMELINE = ("seconds", "tokens_per_second", "batch", "kv_use", "written")


class Account:
    """Counts rows as they are written."""

    def __init__(self) -> None:
        self.rows = self.failed = 0
        self._errors: Counter[str] = Counter()

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += len(rows)
        for row in rows:
            if row["error"] is not None:
                self.failed += 1
                if len(self._errors) < 1000 or row["error"] in self._errors:
                    self._errors[row["error"]] += 1

    @property
    def errors(self) -> dict[str, int]:
        """The most frequent messages."""
        return dict(self._errors.most_common(SHOWN_ERRORS))


def summarise(out: str, account: Account, engine: Any, sight: Any, engine_seconds: float) -> Summary:
    """What an engine did since its counters were reset."""
    stats, drafted = engine.stats(), engine.speculation_stats()
    return Summary(
        out,
        rows=account.rows,
        rows_before=sight.before,
        failed=account.failed,
        errors=account.errors,
        generated_tokens=stats.generated_tokens,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        draft_tokens=drafted.proposed,
        accepted_tokens=drafted.accepted,
        seconds=sight.seconds,
        engine_seconds=engine_seconds,
        steps=stats.steps,
        peak_batch=stats.peak_running,
        mean_batch=stats.rows / max(1, stats.steps),
        preemptions=stats.preemptions,
        kv_peak_bytes=stats.kv_bytes_peak,
        timeline={name: [sample[i] for sample in sight.samples] for i, name in enumerate(TIMELINE)},
    )
