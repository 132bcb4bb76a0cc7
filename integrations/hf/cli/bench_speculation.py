"""`hf-paged bench speculation`: what drafting gives, by method and batch size."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import Requests, load_model, prepare, write_report
from hf_paged.integrations.cli.console import Bar, check_outputs, command, settings_of


@command
def speculation(
    model: opt.Model = None,
    draft: Annotated[str | None, typer.Option(help="Draft model: folder or hub name (default: bundled).")] = None,
    dataset: opt.Dataset = None,
    field: opt.Field = "question",
    template: opt.Template = None,
    requests: Requests = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens each request makes.")] = 128,
    methods: Annotated[str, typer.Option(help="Of draft, lookup, suffix and auto, with commas.")] = "draft,lookup,auto",
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8,32",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    peers: Annotated[bool, typer.Option(help="Time transformers' assisted generation and lookup, row by row.")] = True,
    vllm_python: Annotated[
        str | None, typer.Option(help="An interpreter that can import vllm: time its n-gram speculation too.")
    ] = None,
    repeats: opt.Repeats = 3,
    plot: Annotated[str | None, typer.Option(help="Picture of speed over batch size.")] = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
) -> None:
    """Speculative decoding against none: engines in turns, tokens compared in every run.

    Every engine has answered the same prompts once before, with another seed (greedy: the same answers), so that
    **suffix** and **auto** know texts of that kind. **hf assisted** and **hf lookup** are transformers' own. **best
    tree** is the speed that the drafts that were taken and the forwards that were timed allow, were there no
    bookkeeping. Peers are timed when all engines are done, and only where the tokens are greedy.
    """
    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.models import bundled, load
    from hf_paged.integrations.bench.speculation import Sampling, plot_speculation, run_speculation
    from hf_paged.integrations.cli.tables import show_speculation

    settings = settings_of(locals())
    names = [name.strip() for name in methods.split(",") if name.strip()]
    wrong = [name for name in names if name not in ("draft", "lookup", "suffix", "auto")]
    if wrong:
        raise BadInput(f"--methods {methods}: {wrong[0]} is none of draft, lookup, suffix and auto")
    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise BadInput(f"--batches {batches}: numbers of at least 1, with commas")
    check_outputs(json_out, plot)
    loaded = load_model(model, dtype, device, threads, (), vllm_python, json_out)
    drafting: Any = None
    if {"draft", "auto"} & set(names):
        drafting = load(draft or bundled("models/draft"), dtype, device).model
    workload = prepare(loaded, dataset, field, template, requests, str(new_tokens), None, new_tokens)
    with Bar() as bar:
        report = run_speculation(
            loaded,
            drafting,
            workload,
            names,
            batches=sizes,
            repeats=repeats,
            sampling=Sampling(temperature, top_p),
            peers=peers,
            vllm_python=vllm_python,
            settings=settings,
            progress=bar,
        )
    if plot is not None:
        plot_speculation(report, plot)
    if json_out != "-":
        show_speculation(report)
    write_report(report, json_out)
