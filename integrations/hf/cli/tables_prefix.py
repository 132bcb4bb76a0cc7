"""The report of `hf-paged bench prefix` as tables for people."""

from __future__ import annotations

from typing import Any

from hf_paged.integrations.cli.tables import percent, table, yes_no


def show_prefix(report: dict[str, Any]) -> None:
    """Whatever parts the report has."""
    if "rows" in report:
        _show_engines(report)
        _show_parts(report)
    _show_queues(report)
    if "trace" in report:
        _show_curves(report["trace"])


def _show_engines(report: dict[str, Any]) -> None:
    rows = []
    for row in report["rows"]:
        detail = row["detail"]
        rows.append(
            [
                row["engine"],
                f"{row['seconds']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{report['ratios'].get(row['engine'], 1.0):.2f}×",
                f"{detail['prompt_tokens']}" if "prompt_tokens" in detail else "–",
                f"{detail['cached_tokens']}" if "cached_tokens" in detail else "–",
                yes_no(row),
            ]
        )
    caption = (
        f"{report['computed_tokens']} of {report['prompt_tokens']} prompt tokens are computed, "
        f"{report['computed_over_optimal']:.3f}× the least that is possible. Where nothing is shared the tree costs "
        f"{100 * (report['no_hits']['slowdown'] - 1):+.1f} % of the time."
    )
    title = f"{report['requests']} requests under one header, {report['dtype']}, median of {report['repeats']}"
    columns = ["engine", "seconds", "tokens/s", "our speed / its", "computed", "cached", "equal to no tree"]
    table(title, columns, rows, caption)


def _show_parts(report: dict[str, Any]) -> None:
    tree, attention = report["tree"], report["attention"]
    rows = [
        ["insert", f"{tree['insert_us_per_token']:.2f} µs a token"],
        ["match", f"{tree['match_us_per_token']:.2f} µs a token"],
        ["evict", f"{tree['evict_us_per_page']:.1f} µs a page"],
        ["memory", f"{tree['bytes_per_node']:.0f} bytes a node"],
    ]
    table(f"The tree: {tree['sequences']} sequences, {tree['tokens']} tokens", ["", ""], rows)
    times = attention["ms"]
    row = [f"{times['grouped']:.2f}", f"{times['ungrouped']:.2f}", f"{attention['ratio']:.2f}×"]
    title = f"Attention of a step: {attention['rows']} rows that share {attention['shared']} tokens"
    table(title, ["grouped, ms", "ungrouped, ms", "ratio"], [row])


def _show_queues(report: dict[str, Any]) -> None:
    names = {
        "trace_list": "the trace, as a list",
        "sessions_list": "sessions, as a list",
        "sessions_arrival": "sessions, as they arrive",
    }
    rows = [
        [
            shown,
            f"{part['requests']}",
            percent(part["pages"] / part["working_set"]),
            percent(part["hit_rate"]),
            percent(part["unlimited_hit_rate"]),
            f"{100 * part['of_unlimited']:.2f} %",
        ]
        for name, shown in names.items()
        if (part := report.get(name)) is not None
    ]
    if rows:
        columns = ["", "requests", "pool / working set", "hit rate", "unlimited", "share of it"]
        table("Through scheduler and memory, without a model", columns, rows)


def _show_curves(trace: dict[str, Any]) -> None:
    rows = [
        [percent(share), *(f"{100 * value:.2f} %" for value in values)]
        for share, *values in zip(trace["shares"], trace["lru"], trace["ours"], trace["optimum"], strict=True)
    ]
    caption = f"An unlimited cache hits {100 * trace['unlimited']:.2f} %."
    table("In order of arrival", ["pool", "LRU", "hf_paged", "optimum"], rows, caption)
