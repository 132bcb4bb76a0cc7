"""`hf-paged bench eval`: a dataset through the engine, and through transformers' pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import Requests, load_model, write_report
from hf_paged.integrations.cli.bench_prefix import SHOT, few_shot_texts
from hf_paged.integrations.cli.console import Bar, command, settings_of


@command
def evaluation(
    model: opt.Model = None,
    dataset: opt.Dataset = None,
    field: opt.Field = "question",
    template: opt.Template = None,
    requests: Requests = 64,
    shots: Annotated[str | None, typer.Option(help="File whose first rows are the header.")] = None,
    shot_template: Annotated[str, typer.Option(help="Text of a row of the header; names fields in braces.")] = SHOT,
    num_shots: Annotated[int, typer.Option(min=1, help="Rows in the header.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens each row makes at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="The pipeline's.")] = 16,
    peer_rows: Annotated[int | None, typer.Option(min=1, help="Rows that the pipeline gets; default: all.")] = None,
    repeats: opt.Repeats = 1,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
) -> None:
    """Rows a second of `hf-paged eval` and of `pipeline("text-generation", batch_size=…)` with the default cache.

    Greedy, under one header; tokens are compared. Beside it: how memory grows from row 100 on, and which share of the
    time the engine does not compute.
    """
    from hf_paged.integrations.bench.evaluation import run_eval

    options = locals()
    settings = settings_of(options)
    loaded = load_model(model, dtype, device, threads, (), None, json_out)
    header, texts = few_shot_texts(options)
    with Bar() as bar:
        report = run_eval(
            loaded,
            [header + text for text in texts],
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=repeats,
            peer_rows=peer_rows,
            settings=settings,
            progress=bar,
        )
    if json_out != "-":
        show(report)
    write_report(report, json_out)


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    from hf_paged.integrations.cli.tables import percent, table

    rows = [
        ["hf_paged", f"{report['requests']}", f"{report['rows_per_second']:.2f}", f"{report['ratio']:.2f}×"],
        ["pipeline", f"{report['peer_requests']}", f"{report['peer_rows_per_second']:.2f}", "1.00×"],
    ]
    differ = "all tokens equal" if report["tokens_equal"] else f"{report['rows_differing']} rows differ"
    gaps = [f"{found['top2_gap']:.1g}" for found in report["differences"][:5]]
    ties = f" (where they part, the two best logits lie {', '.join(gaps)} apart)" if gaps else ""
    growth = report["rss_growth_bytes"]
    grown = "" if growth is None else f" Memory grew by {growth / 1e6:.0f} MB from row 100 on."
    caption = (
        f"{differ}{ties}. Outside the engine: {percent(report['outside_engine'])} of the time; "
        f"{percent(report['hit_rate'])} of prompt tokens cached; {report['mean_batch']:.0f} rows a step.{grown}"
    )
    title = (
        f"{report['prompt_tokens']:.0f} prompt tokens, at most {report['new_tokens']} new ones, {report['dtype']}, "
        f"{report['device']}, batch size {report['batch_size']}, median of {report['repeats']}"
    )
    table(title, ["engine", "rows", "rows/s", "speed"], rows)
    typer.echo(caption)
