"""Summaries of several processes as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from hf_paged.integrations.datasets.summary import SHOWN_ERRORS, Summary

ADDED = (
    *("rows", "rows_before", "failed", "failed_before", "steps", "generated_tokens", "prompt_tokens", "cached_tokens"),
    *("draft_tokens", "accepted_tokens", "peak_batch", "mean_batch", "preemptions", "kv_peak_bytes"),
)
SHARES = ("kv_use",)  # of the timeline; the rest of it adds up


def summary_of(report: dict[str, Any]) -> Summary:
    """A summary from what its `to_dict` gave."""
    return Summary(**{field.name: report[field.name] for field in fields(Summary)})


def joined(summaries: Sequence[Summary]) -> Summary:
    """One summary of processes that ran beside each other: counts add up, times are those of the slowest."""
    errors: Counter[str] = Counter()
    for summary in summaries:
        errors.update(summary.errors)
    seconds, spent = max(s.seconds for s in summaries), sum(s.seconds for s in summaries)
    return Summary(
        summaries[0].out,
        finished=all(s.finished for s in summaries),
        errors=dict(errors.most_common(SHOWN_ERRORS)),
        seconds=seconds,
        engine_seconds=seconds * sum(s.engine_seconds for s in summaries) / spent if spent else 0.0,
        timeline=_timeline([s.timeline for s in summaries]),
        **{name: sum(getattr(s, name) for s in summaries) for name in ADDED},
    )


def _timeline(timelines: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Over the times of the one that ran longest; after its end a process adds nothing but its rows."""
    lines = [line for line in timelines if line.get("seconds")]
    if not lines:
        return timelines[0]
    at = max(lines, key=lambda line: line["seconds"][-1])["seconds"]
    made = {"seconds": list(at)}
    for name in (name for name in lines[0] if name != "seconds"):
        rest = None if name == "written" else 0.0
        total = sum(np.interp(at, line["seconds"], line[name], right=rest) for line in lines)
        made[name] = [float(value) for value in (total / len(lines) if name in SHARES else total)]
    return made
