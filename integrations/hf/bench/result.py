"""What one run of an engine gave, and figures over several runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One pass of a workload through one engine.

    tokens: token ids made, a list for each request. seconds: wall time from handing in the requests to the
    last result. ttft: seconds from the start to each request's first token. tpot: seconds for each token
    after it; None where a request makes one token. kv_waste: share of the KV storage held that no live token
    needed; None if not known. detail: what else the engine can tell.
    """

    tokens: list[list[int]]
    seconds: float
    ttft: list[float]
    tpot: list[float | None]
    kv_waste: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)


def percentile(values: Sequence[float | None], share: float) -> float | None:
    """The value under which `share` (0 to 1) of the values lie, interpolated; None for no values."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    place = share * (len(known) - 1)
    low = int(place)
    high = min(low + 1, len(known) - 1)
    return known[low] + (known[high] - known[low]) * (place - low)


def per_token(first: float, last: float, count: int) -> float | None:
    """Seconds for each token after the first."""
    return (last - first) / (count - 1) if count > 1 else None


def summary(engine: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One row of a benchmark's table: medians over the runs; times to tokens are those of the median run."""
    ordered = sorted(runs, key=lambda run: run.seconds)
    middle = ordered[(len(ordered) - 1) // 2]
    seconds = statistics.median(run.seconds for run in runs)
    tokens = sum(map(len, middle.tokens))
    return {
        "engine": engine,
        "requests": len(middle.tokens),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "ttft_p50": percentile(middle.ttft, 0.5),
        "ttft_p99": percentile(middle.ttft, 0.99),
        "tpot_p50": percentile(middle.tpot, 0.5),
        "tpot_p99": percentile(middle.tpot, 0.99),
        "kv_waste": middle.kv_waste,
        "seconds_of_runs": [run.seconds for run in runs],
        "detail": middle.detail,
    }
