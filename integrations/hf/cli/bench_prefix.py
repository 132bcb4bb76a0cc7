"""`hf-paged bench prefix`: what sharing prefixes gives, with a model and on traces without one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import load_model, write_report
from hf_paged.integrations.cli.console import Bar, check_outputs, command

SHOT = "Question: {question}\nAnswer: {answer}\n\n"


@command
def prefix(
    model: opt.Model = None,
    dataset: opt.Dataset = None,
    field: opt.Field = "question",
    template: opt.Template = None,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", min=1, help="How many prompts: 64; without a model all.")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="File whose first rows are the header.")] = None,
    shot_template: Annotated[str, typer.Option(help="Text of a row of the header; names fields in braces.")] = SHOT,
    num_shots: Annotated[int, typer.Option(min=1, help="Rows in the header.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens each request makes.")] = 32,
    generate: Annotated[bool, typer.Option(help="Time transformers' generate too.")] = True,
    repeats: opt.Repeats = 3,
    trace: Annotated[str | None, typer.Option(help="A trace with ids of blocks (hash_ids), .jsonl: no model.")] = None,
    sessions: Annotated[str | None, typer.Option(help="A file with prompts that grow: no model.")] = None,
    sessions_field: Annotated[str, typer.Option(help="Field of the prompts in --sessions.")] = "input",
    pool: Annotated[float, typer.Option(help="Pool of the queue, as a share of the working set.")] = 0.05,
    plot: Annotated[str | None, typer.Option(help="Picture of hit rate over pool size, from --trace.")] = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
) -> None:
    """Questions under one header, with the radix tree, without it, and by generate; and the parts by themselves.

    With --trace or --sessions no model runs: prompts go through scheduler and memory, and what the tree finds is
    counted (as a list, in an order of its own); for a trace also in order of arrival, over the size of the pool, for
    LRU, for the engine's eviction, and for the best there is.
    """
    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.cli.tables_prefix import show_prefix

    options = locals()
    if plot is not None and trace is None:
        raise BadInput("--plot needs --trace: a trace whose hit rates it shows")
    if not 0 < pool <= 1:
        raise BadInput(f"--pool {pool}: a share over 0 and up to 1")
    check_outputs(json_out, plot)
    without = trace or sessions
    if requests is None and not without:
        options["requests"] = 64
    report = _without_model(options) if without else _with_model(options)
    if json_out != "-":
        show_prefix(report)
    write_report(report, json_out)


def _with_model(options: dict[str, Any]) -> dict[str, Any]:
    from hf_paged.integrations.bench.prefix import few_shot, run_prefix
    from hf_paged.integrations.bench.prefix_parts import shared_attention, tree_speed
    from hf_paged.integrations.cli.console import settings_of

    settings = settings_of(options)
    loaded = load_model(*(options[name] for name in ("model", "dtype", "device", "threads")), (), None, None)
    shots, texts = few_shot_texts(options)
    load = few_shot(loaded.tokenizer, shots, texts, options["new_tokens"], loaded.limit)
    with Bar() as bar:
        report = run_prefix(
            loaded,
            load,
            repeats=options["repeats"],
            with_generate=options["generate"],
            settings=settings,
            progress=bar,
        )
        bar.note("the tree")
        report["tree"] = tree_speed()
        bar.note("attention")
        report["attention"] = shared_attention()
    return report


def few_shot_texts(options: dict[str, Any]) -> tuple[str, list[str]]:
    """The header and the questions; by default those of the bundled prompts, the last of them as the header."""
    from itertools import islice

    from hf_paged.integrations.bench.data import BadInput, read_prompts, rows_of
    from hf_paged.integrations.bench.models import bundled

    field, count = options["field"], options["num_shots"]
    template = opt.template_of(options["template"], field)
    dataset = options["dataset"] or bundled("data/prompts.jsonl")
    if options["shots"] is None:
        texts = read_prompts(dataset, field, template)
        shots, texts = "\n\n".join(texts[-count:]) + "\n\n", texts[:-count][: options["requests"]]
        if not texts:
            raise BadInput(f"{dataset} has too few rows for a header of {count}: give --shots")
        return shots, texts
    rows = list(islice(rows_of(options["shots"]), count))
    try:
        shots = "".join(opt.unescaped(options["shot_template"]).format(**row) for row in rows)
    except (KeyError, IndexError, ValueError) as error:
        raise BadInput(f"--shot-template does not fit the rows of {options['shots']}: {error!r}") from error
    return shots, read_prompts(dataset, field, template, options["requests"])


def _without_model(options: dict[str, Any]) -> dict[str, Any]:
    from hf_paged.integrations.bench.data import read_column
    from hf_paged.integrations.bench.prefix_queue import run_queue
    from hf_paged.integrations.bench.prefix_trace import plot_curves, run_trace

    report: dict[str, Any] = {"benchmark": "prefix traces"}
    with Bar() as bar:
        if options["trace"]:
            bar.note("the trace as a list")
            blocks = read_column(options["trace"], "hash_ids", options["requests"])
            report["trace_list"] = run_queue(blocks, page_size=1, pool=options["pool"])
            bar.note("the trace in order of arrival")
            report["trace"] = run_trace(blocks)
            if options["plot"]:
                plot_curves(report["trace"], options["plot"])
        if options["sessions"]:
            bar.note("sessions")
            prompts = _session_prompts(options)
            size = options["page_size"] or 16
            report["sessions_list"] = run_queue(prompts, page_size=size, pool=options["pool"])
            report["sessions_arrival"] = run_queue(prompts, page_size=size, pool=options["pool"], free_order=False)
    return report


def _session_prompts(options: dict[str, Any]) -> list[list[int]]:
    """Prompts of a file as the model's tokenizer has them, cut to its context."""
    from transformers import AutoTokenizer

    from hf_paged.integrations.bench.data import read_prompts
    from hf_paged.integrations.bench.models import check_model_name
    from hf_paged.integrations.cli.console import quiet_transformers

    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(check_model_name(options["model"]))
    limit = min(tokenizer.model_max_length, 1 << 20)
    texts = read_prompts(options["sessions"], options["sessions_field"], count=options["requests"])
    return [tokenizer(text)["input_ids"][:limit] for text in texts]
