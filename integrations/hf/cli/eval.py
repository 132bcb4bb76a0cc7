"""`hf-paged eval`: a model over a whole dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.console import (
    check_outputs,
    command,
    complain,
    print_json,
    quiet_transformers,
    settings_of,
)
from hf_paged.integrations.cli.generate import (
    IgnoreEos,
    MaxTokens,
    MinP,
    MinTokens,
    Penalty,
    Stop,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from hf_paged.integrations.datasets.summary import Summary

INTERRUPTED, RAY = 130, "ray"
SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos")
METHODS = "off, draft, lookup, suffix, layer_skip, auto"
_data, _out = "Dataset", "Output"

Dataset = Annotated[
    str, typer.Option(help="A .jsonl, .csv (gzipped or not) or .parquet file, a folder, or a hub name.")
]
Split = Annotated[str | None, typer.Option(help="Split of a hub dataset.", rich_help_panel=_data)]
Subset = Annotated[str | None, typer.Option(help="Configuration of a hub dataset.", rich_help_panel=_data)]
Limit = Annotated[int | None, typer.Option(help="Only the first so many rows.", rich_help_panel=_data)]
Template = Annotated[
    str | None,
    typer.Option(help="Text, or a file with it: Jinja ({{ question }}) or {question}. Default: column prompt."),
]
Messages = Annotated[str | None, typer.Option(help="Column with a list of chat messages.", rich_help_panel=_data)]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the text into the chat template, as a user's turn.", rich_help_panel=_data)
]
TooLong = Annotated[str, typer.Option(help="Prompts that do not fit: fail, or truncate-left.", rich_help_panel=_data)]
Out = Annotated[str, typer.Option(help="Directory of the output; of a run begun before, to go on with it.")]
Format = Annotated[str, typer.Option(help="jsonl or parquet.", rich_help_panel=_out)]
ShardRows = Annotated[int, typer.Option(help="Rows of a Parquet shard.", rich_help_panel=_out)]
Plot = Annotated[
    str | None, typer.Option(help="Picture of throughput, batch and KV use over time.", rich_help_panel=_out)
]
Draft = Annotated[str | None, typer.Option("--draft", help="Draft model: folder or hub name.")]
Speculation = Annotated[str | None, typer.Option(help=f"One of {METHODS}; draft where a draft model is given.")]
Seed = Annotated[int, typer.Option(help="Of the run; every row has one of its own from it.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or auto; by default as saved, on a CPU float32.")
]
Window = Annotated[int | None, typer.Option(help="Rows queued in the engine at once.", rich_help_panel="Engine")]

Backend = Annotated[
    str | None,
    typer.Option(help="auto, torch or triton for the attention ops; or ray.", rich_help_panel="Engine"),
]
Workers = Annotated[int | None, typer.Option(help="Engines with --backend ray.", rich_help_panel="Engine")]


@command
def evaluate(
    dataset: Dataset,
    out: Out,
    model: opt.Model = None,
    draft: Draft = None,
    template: Template = None,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    split: Split = None,
    subset: Subset = None,
    limit: Limit = None,
    messages: Messages = None,
    chat: Chat = False,
    too_long: TooLong = "fail",
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    min_tokens: MinTokens = 0,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    speculation: Speculation = None,
    format: Format = "jsonl",
    shard_rows: ShardRows = 1000,
    plot: Plot = None,
    json_out: opt.JsonOut = None,
    dtype: Dtype = None,
    device: opt.Device = None,
    threads: opt.Threads = None,
    window: Window = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    memory_fraction: opt.MemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
    kv_dtype: opt.KvDtype = None,
    backend: Backend = None,
    workers: Workers = None,
) -> None:
    """Generate for every row of a dataset, and write the rows to a directory.

    Stopped in any way, the same command goes on; one with other settings is refused. Rows that fail are written with
    their error; the exit code is 0 all the same. After Ctrl-C it is 130.
    """
    options = locals() | ({"backend": None} if backend == RAY else {})
    from hf_paged.integrations.datasets import generate_dataset
    from hf_paged.integrations.datasets.template import Template

    check_outputs(json_out, plot)
    settings = settings_of(options)
    quiet_transformers()
    opt.set_threads(threads)
    passed = ("split", "subset", "limit", "messages", "chat", "too_long", "format", "shard_rows", "window", "seed")
    settings |= {"workers": workers} | ({"backend": RAY} if backend == RAY else {})
    try:
        summary = generate_dataset(
            model,
            dataset,
            out,
            template=None if template is None else Template.load(template, escapes=True),
            sampling={name: options[name] for name in SAMPLING} | {"stop": tuple(map(opt.unescaped, stop or ()))},
            draft_model=draft,
            speculation=speculation,
            dtype=dtype,
            device=device,
            progress=True,
            **{name: options[name] for name in passed},
            **settings,
        )
    except KeyboardInterrupt as stopped:
        if speaks():
            interrupted(stopped, json_out, plot)
        raise typer.Exit(INTERRUPTED) from None
    if speaks():
        show(summary, json_out, plot)


def speaks() -> bool:
    """Whether this is the process that tells of the whole job."""
    from hf_paged.integrations.datasets.processes import launched

    if not launched():
        return True
    from accelerate import PartialState

    return PartialState().is_main_process


def interrupted(stopped: KeyboardInterrupt, json_out: str | None, plot: str | None) -> None:
    """Tell how far a run came, and how it goes on."""
    summary = getattr(stopped, "summary", None)
    if summary is not None:
        show(summary, json_out, plot)
    complain("stopped by Ctrl-C: what was done is written; the same command goes on from there")


def show(summary: Summary, json_out: str | None, plot: str | None) -> None:
    """The summary on stdout, or as JSON, and the picture."""
    from hf_paged.integrations.datasets import plot_summary

    report: dict[str, Any] = summary.to_dict()
    if plot is not None:
        plot_summary(report, plot)
    if json_out != "-":
        for line in lines_of(summary):
            typer.echo(line)
    if json_out is not None:
        print_json(report, json_out)


def lines_of(summary: Summary) -> list[str]:
    """A summary as text."""
    rows = summary.rows + summary.rows_before
    lines = [f"{rows} rows in {summary.out}" + ("" if summary.finished else ", not all yet")]
    if rows == 0 and summary.finished:
        lines = [f"the dataset is empty: no rows in {summary.out}"]
    if summary.rows_before:
        lines.append(f"  {summary.rows_before} were there, {summary.rows} are new")
    if summary.rows:
        taken = summary.acceptance
        drafts = "" if taken is None else f", {100 * taken:.0f} % of drafts taken"
        lines += [
            f"  {summary.rows_per_second:.1f} rows/s, {summary.tokens_per_second:.0f} tokens/s, "
            f"{summary.seconds:.1f} s, of which outside the engine {100 * summary.outside_engine:.1f} %",
            f"  {100 * summary.hit_rate:.0f} % of prompt tokens cached{drafts}; {summary.mean_batch:.0f} rows a step; "
            f"KV {summary.kv_peak_bytes / 1e6:.0f} MB at the peak",
        ]
    failed = summary.failed + summary.failed_before
    if failed:
        lines.append(f"  {failed} rows failed{':' if summary.errors else ', all of them before'}")
        lines += [f"    {count} × {error}" for error, count in summary.errors.items()]
    return lines
