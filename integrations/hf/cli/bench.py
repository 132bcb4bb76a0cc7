"""`hf-paged bench`: throughput, latency and memory; `bench_prefix.py` has the fourth."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.console import (
    Bar,
    check_writable,
    command,
    complain,
    print_json,
    quiet_transformers,
    settings_of,
    warn_if_busy,
)

if TYPE_CHECKING:
    from hf_paged.integrations.bench.models import Loaded
    from hf_paged.integrations.bench.workload import Workload

app = typer.Typer(help="Engines timed side by side, in turns, warm; medians count.", no_args_is_help=True)

Lengths = Annotated[
    str | None, typer.Option(help="Tokens each request makes: one number, or a file with a column of numbers.")
]
LengthsField = Annotated[str | None, typer.Option(help="Column of the output lengths.")]
MaxOutput = Annotated[int, typer.Option(min=1, help="No output length is over this.")]
Requests = Annotated[int, typer.Option("--requests", "-n", min=1, help="How many prompts.")]


def prepare(
    loaded: Loaded,
    dataset: str | None,
    field: str,
    template: str | None,
    requests: int,
    lengths: str | None,
    lengths_field: str | None,
    max_output: int,
) -> Workload:
    """Read the files, tokenise the prompts and hold them against the model's limit."""
    from hf_paged.integrations.bench.data import read_lengths, read_prompts
    from hf_paged.integrations.bench.models import bundled
    from hf_paged.integrations.bench.workload import build_workload

    dataset = dataset or bundled("data/prompts.jsonl")
    lengths = lengths or bundled("data/output_lengths.csv")
    texts = read_prompts(dataset, field, opt.template_of(template, field), requests)
    counts = read_lengths(lengths, requests, max_output, lengths_field)
    return build_workload(loaded.tokenizer, texts, counts, loaded.limit)


@app.command()
@command
def throughput(
    model: opt.Model = None,
    dataset: opt.Dataset = None,
    field: opt.Field = "question",
    template: opt.Template = None,
    requests: Requests = 64,
    output_lengths: Lengths = None,
    lengths_field: LengthsField = None,
    max_output: MaxOutput = 256,
    peers: Annotated[str, typer.Option(help="Of hf, hf-cb and vllm, with commas.")] = "hf,hf-cb",
    vllm_python: opt.VllmPython = None,
    repeats: opt.Repeats = 3,
    check: Annotated[bool, typer.Option(help="Compare tokens with generate's, each row alone.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory too, in a process of its own.")] = False,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    memory_fraction: opt.MemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
    kv_dtype: opt.KvDtype = None,
    backend: opt.Backend = None,
) -> None:
    """Many requests at once: tokens a second of hf_paged and of its peers.

    Greedy; end-of-sequence tokens end nothing, so that each request makes exactly its length. **hf** is `generate`
    at the best of batch sizes 8, 16 and 32, left-padded, of whose tokens only those asked for count; **hf-cb** is
    transformers' continuous batching; **vllm** runs under --vllm-python.
    """
    from hf_paged.integrations.bench.memory import measure_elsewhere
    from hf_paged.integrations.bench.throughput import check_peers, run_throughput
    from hf_paged.integrations.cli.tables import show_memory, show_throughput

    settings = settings_of(locals())
    names = check_peers(peers)
    loaded = load_model(model, dtype, device, threads, names, vllm_python, json_out)
    load = prepare(loaded, dataset, field, template, requests, output_lengths, lengths_field, max_output)
    with Bar() as bar:
        report = run_throughput(
            loaded,
            load,
            names,
            repeats=repeats,
            vllm_python=vllm_python,
            settings=settings,
            check_tokens=check,
            progress=bar,
        )
        if memory:
            bar.note("memory")
            report["memory"] = measure_elsewhere(loaded.name, dtype, load, settings)
    if json_out != "-":
        show_throughput(report)
        if memory:
            show_memory(report["memory"])
    write_report(report, json_out)


@app.command()
@command
def latency(
    model: opt.Model = None,
    dataset: opt.Dataset = None,
    field: opt.Field = "question",
    template: opt.Template = None,
    requests: Requests = 8,
    output_lengths: Lengths = "128",
    lengths_field: LengthsField = None,
    max_output: MaxOutput = 256,
    peers: Annotated[str, typer.Option(help="Of hf and vllm, with commas.")] = "hf",
    vllm_python: opt.VllmPython = None,
    repeats: opt.Repeats = 3,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    kv_dtype: opt.KvDtype = None,
    backend: opt.Backend = None,
) -> None:
    """One request at a time: time to the first token and for each token after it.

    **hf** is `generate` with its default cache on one row.
    """
    from hf_paged.integrations.bench.latency import run_latency
    from hf_paged.integrations.bench.throughput import check_peers
    from hf_paged.integrations.cli.tables import show_latency

    settings = settings_of(locals())
    names = check_peers(peers, ("hf", "vllm"))
    loaded = load_model(model, dtype, device, threads, names, vllm_python, json_out)
    load = prepare(loaded, dataset, field, template, requests, output_lengths, lengths_field, max_output)
    with Bar() as bar:
        report = run_latency(
            loaded, load, names, repeats=repeats, vllm_python=vllm_python, settings=settings, progress=bar
        )
    if json_out != "-":
        show_latency(report)
    write_report(report, json_out)


@app.command()
@command
def memory(
    model: opt.Model = None,
    dataset: opt.Dataset = None,
    field: opt.Field = "question",
    template: opt.Template = None,
    requests: Requests = 64,
    output_lengths: Lengths = None,
    lengths_field: LengthsField = None,
    max_output: MaxOutput = 256,
    dtype: opt.Dtype = "float32",
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    memory_fraction: opt.MemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
    kv_dtype: opt.KvDtype = None,
    backend: opt.Backend = None,
) -> None:
    """Peak memory above the model, in a process of its own on the CPU, against the KV that live tokens need."""
    from hf_paged.integrations.bench.memory import measure_elsewhere
    from hf_paged.integrations.cli.tables import show_memory

    settings = settings_of(locals())
    loaded = load_model(model, dtype, "cpu", None, (), None, json_out)
    load = prepare(loaded, dataset, field, template, requests, output_lengths, lengths_field, max_output)
    report = measure_elsewhere(loaded.name, dtype, load, settings)
    if json_out != "-":
        show_memory(report)
    write_report(report, json_out)


def load_model(
    model: str | None,
    dtype: str,
    device: str | None,
    threads: int | None,
    peers: list[str] | tuple[str, ...],
    vllm_python: str | None,
    json_out: str | None,
) -> Loaded:
    """Refuse what can be refused at once, then load the model."""
    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.models import load

    check_writable(json_out)
    if "vllm" in peers and vllm_python is None:
        raise BadInput("peer vllm needs --vllm-python: an interpreter that can import vllm")
    if vllm_python is not None and shutil.which(vllm_python) is None:
        raise BadInput(f"--vllm-python {vllm_python}: no such interpreter")
    quiet_transformers()
    opt.set_threads(threads)
    warn_if_busy()
    return load(model, dtype, device)


def write_report(report: dict[str, Any], json_out: str | None) -> None:
    for peer, why in report.get("skipped", {}).items():
        complain(f"peer {peer} was left out: {why}")
    if json_out is not None:
        print_json(report, json_out)
