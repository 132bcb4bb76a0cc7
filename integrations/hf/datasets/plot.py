"""The picture of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput

PANELS = (("tokens_per_second", "tokens/s", 1), ("batch", "rows a step", 1), ("kv_use", "KV pool in use, %", 100))


def plot_summary(summary: Mapping[str, Any], path: str | Path) -> None:
    """Draw throughput, batch size and KV use over time.

    Args:
        summary: as `summary.json` holds it.
        path: of the picture; its suffix says which kind.

    Raises:
        BadInput: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("a plot needs matplotlib: pip install 'hf-paged[plot]'") from error
    timeline = summary["timeline"]
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(len(PANELS), sharex=True)
    for panel, (name, label, factor) in zip(panels, PANELS, strict=True):
        panel.plot(timeline.get("seconds", []), [factor * value for value in timeline.get(name, [])], linewidth=1.2)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_title(
        f"{summary['rows']} rows, {summary['generated_tokens']} tokens in {summary['seconds']:.1f} s; "
        f"{100 * summary['hit_rate']:.0f} % of prompt tokens cached"
    )
    panels[-1].set_xlabel("seconds")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BadInput(f"plot {path}: cannot be written: {error}") from error
