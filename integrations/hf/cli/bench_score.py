"""`hf-paged bench score`: multiple choice, against lm-evaluation-harness's own model type."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import Requests, load_model, write_report
from hf_paged.integrations.cli.console import Bar, command, settings_of


@command
def score(
    dataset: Annotated[str, typer.Option(help="File with columns question, choices, answer and subject (MMLU's).")],
    model: opt.Model = None,
    shots: Annotated[str | None, typer.Option(help="File with the answered questions of the headers.")] = None,
    num_shots: Annotated[int, typer.Option(min=0, help="Answered questions in a header.")] = 5,
    requests: Requests = 500,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes that hf tries, with commas.")] = "1,4,8,16,32",
    sample: Annotated[int, typer.Option(min=1, help="Questions on which it tries them.")] = 24,
    repeats: opt.Repeats = 3,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
) -> None:
    """Log-likelihoods of the answers to multiple-choice questions under few-shot headers.

    **hf** is lm-eval's own model type, at the batch size that is fastest on a sample. Both get the same requests
    through lm-eval's interface, from texts to log-likelihoods; nothing is cached from run to run.
    """
    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.score import read_questions, run_score

    settings = settings_of(locals())
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise BadInput(f"--batch-sizes {batch_sizes}: numbers of at least 1, with commas")
    questions = read_questions(dataset, shots, requests, num_shots)
    loaded = load_model(model, dtype, device, threads, (), None, json_out)
    with Bar() as bar:
        report = run_score(
            loaded, questions, sizes=sizes, sample=sample, repeats=repeats, settings=settings, progress=bar
        )
    if json_out != "-":
        _show(report)
    write_report(report, json_out)


def _show(report: dict[str, Any]) -> None:
    from hf_paged.integrations.cli.tables import percent, table

    rows = [
        [row["engine"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", percent(row["accuracy"])]
        for row in report["rows"]
    ]
    caption = (
        f"hf-paged is {report['ratio']:.1f}× as fast as hf in batches of {report['batch_size']} "
        f"({report['cpu_ratio']:.1f}× in processor time). It computed {report['computed_tokens']} tokens and found "
        f"{report['cached_tokens']}; log-likelihoods differ by {report['largest_difference']:.1g} at most."
    )
    title = f"{report['questions']} questions, {report['dtype']}, median of {report['repeats']}"
    table(title, ["lm-eval model", "seconds", "processor seconds", "accuracy"], rows, caption)
