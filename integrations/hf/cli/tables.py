"""Reports of benchmarks as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{1000 * value:.{0 if value >= 1 else 1}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def yes_no(row: dict[str, Any]) -> str:
    """Whether tokens are equal, and how many rows are not."""
    if row.get("tokens_equal") is None:
        return "–"
    return "yes" if row["tokens_equal"] else f"{row['rows_differing']} of {row['requests']} differ"


def table(title: str, columns: list[str], rows: list[list[str]], caption: str | None = None) -> None:
    """Print a table on stdout; the first column is left-aligned."""
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*row)
    # Not a terminal (a file, a pipe): nothing to wrap for.
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(shown)


def show_throughput(report: dict[str, Any]) -> None:
    rows = []
    for row in report["rows"]:
        ratio = report["ratios"].get(row["engine"])
        rows.append(
            [
                row["engine"],
                f"{row['tokens']}",
                f"{row['seconds']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                "1.00×" if ratio is None else f"{1 / ratio:.2f}×",
                f"{_milliseconds(row['ttft_p50'])}/{_milliseconds(row['ttft_p99'])}",
                f"{_milliseconds(row['tpot_p50'])}/{_milliseconds(row['tpot_p99'])}",
                percent(row["kv_waste"]),
                yes_no(row),
            ]
        )
    ours = report["rows"][0]["detail"]
    over = [f"{ratio:.2f}× {name}" for name, ratio in report["ratios"].items()]
    caption = (
        (f"hf_paged does {', '.join(over)}. " if over else "")
        + f"Outside the model's forward: {percent(ours['outside_forward'])} of its step time, "
        + f"at {ours['rows_per_step']:.1f} rows a step."
    )
    title = f"{report['requests']} requests, {report['dtype']}, {report['device']}, median of {report['repeats']}"
    columns = ["engine", "tokens", "seconds", "tokens/s", "ratio", "TTFT ms p50/p99", "TPOT ms p50/p99"]
    table(title, [*columns, "KV waste", "equal"], rows, caption)
    for row in report["rows"]:
        for found in row.get("differences", [])[:3]:
            Console().print(
                f"{row['engine']}: request {found['row'] + 1} differs from token {found['position'] + 1} on, "
                f"where the two best logits lie {found['top2_gap']:.2g} apart"
            )


def show_latency(report: dict[str, Any]) -> None:
    rows = []
    for row in report["rows"]:
        ratio = report["ratios"].get(row["engine"], {"tpot": 1.0, "ttft": 1.0})
        rows.append(
            [
                row["engine"],
                _milliseconds(row["ttft"]),
                _milliseconds(row["tpot"]),
                _milliseconds(row["seconds"]),
                *("–" if ratio[name] is None else f"{ratio[name]:.2f}×" for name in ("ttft", "tpot")),
            ]
        )
    title = f"{report['requests']} requests one at a time, {report['dtype']}, {report['device']}, medians"
    columns = ["engine", "TTFT ms", "TPOT ms", "request ms", "our TTFT / its", "our TPOT / its"]
    table(title, columns, rows)


def show_memory(report: dict[str, Any]) -> None:
    megabytes = {key: f"{value / 1e6:.1f} MB" for key, value in report.items() if key.endswith("_bytes")}
    rows = [
        ["the model, after one forward", megabytes["model_rss_bytes"]],
        ["peak above the model", megabytes["above_model_bytes"]],
        ["KV that live tokens needed at the peak", megabytes["kv_live_peak_bytes"]],
        ["KV pages in use at the peak", megabytes["kv_peak_bytes"]],
        ["KV waste", percent(report["kv_waste"])],
        ["1.3 × live KV + 100 MB", f"{megabytes['limit_bytes']}: {'kept' if report['within_limit'] else 'exceeded'}"],
    ]
    table(f"Memory, {report['requests']} requests, {report['dtype']}", ["what", ""], rows)


def show_speculation(report: dict[str, Any]) -> None:
    """Speed by method and batch size, and what became of drafts."""
    rows = []
    for row in report["rows"]:
        drafted = row.get("proposed")
        rows.append(
            [
                row["engine"],
                f"{row['batch']}",
                f"{row['tokens_per_second']:.0f}",
                "–" if row["speedup"] is None else f"{row['speedup']:.2f}×",
                f"{row['tokens_per_forward']:.2f}" if drafted else "–",
                percent(row["accepted"] / drafted) if drafted else "–",
                percent(row.get("in_forwards")),
                f"{row['best_tokens_per_second']:.0f}" if "of_best" in row else "–",
                percent(row.get("of_best")),
                "yes" if row["tokens_equal"] else "NO",
            ]
        )
    kind = f"temperature {report['temperature']}" if report["temperature"] else "greedy"
    title = f"{report['requests']} requests, {report['output_tokens']} tokens, {kind}, median of {report['repeats']}"
    columns = ["engine", "batch", "tokens/s", "speed", "tokens a forward", "accepted", "in forwards"]
    caption = ". ".join(f"{name} cannot run: {why}" for name, why in report["skipped"].items())
    table(title, [*columns, "best tree, tokens/s", "of it", "tokens equal"], rows, caption or None)
