"""`hf-paged demo`: real prompts, the model that ships here, three engines, one table."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.console import Bar, command, print_json, quiet_transformers, warn_if_busy

Requests = Annotated[int, typer.Option("--requests", "-n", min=1, help="How many of the prompts.")]
Show = Annotated[int, typer.Option(min=0, help="How many answers to show.")]


@command
def demo(
    model: opt.Model = None,
    requests: Requests = 48,
    max_output: Annotated[int, typer.Option(min=1, help="No answer is longer than this, in tokens.")] = 160,
    show: Show = 3,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
) -> None:
    """Answer real prompts with transformers and with hf_paged, side by side.

    Each request makes its own number of tokens; the engines take turns, each is warm.
    """
    from hf_paged.integrations.bench.data import read_lengths, read_prompts
    from hf_paged.integrations.bench.models import bundled, load
    from hf_paged.integrations.bench.workload import build_workload

    texts = read_prompts(bundled("data/prompts.jsonl"), "question", opt.QUESTION, requests)
    lengths = read_lengths(bundled("data/output_lengths.csv"), requests, max_output)
    quiet_transformers()
    opt.set_threads(threads)
    warn_if_busy()
    loaded = load(model, dtype, device)
    work = build_workload(loaded.tokenizer, texts, lengths, loaded.limit)
    report, runs = compare_engines(loaded, work)
    answers = [
        {"prompt": texts[row], "answer": loaded.tokenizer.decode(runs[row], skip_special_tokens=True)}
        for row in range(min(show, requests))
    ]
    if as_json:
        print_json({**report, "answers": answers})
        return
    show_table(report)
    show_answers(answers)


def compare_engines(loaded: Any, work: Any) -> tuple[dict[str, Any], list[list[int]]]:
    """Run `generate` (batches of 16), its continuous batching and hf_paged, once each after a short warm-up.

    Returns:
        A report as that of `bench throughput`, and hf_paged's tokens.
    """
    from hf_paged.integrations.bench.equality import compare, generate_alone
    from hf_paged.integrations.bench.machine import machine
    from hf_paged.integrations.bench.peers import HfContinuous, HfGenerate, Paged
    from hf_paged.integrations.bench.result import summary
    from hf_paged.integrations.bench.throughput import without_end_token

    warm = work.only(range(min(4, len(work))))
    rows, tokens = [], []
    # Left alone it takes most of the memory there is, and a while to get it: 8192 tokens a step is what it chooses
    # itself, and twice the pages that all rows need is enough.
    room = 2 * sum(-(-(len(prompt) + n) // 256) for prompt, n in zip(work.prompts, work.lengths, strict=True))
    with Bar() as bar, without_end_token(loaded.model):
        bar.plan(3 + len(work))
        peers = [
            HfGenerate(loaded.model, loaded.pad_id, sizes=(16,)),
            HfContinuous(loaded.model, num_blocks=room, max_batch_tokens=8192),
            Paged(loaded.model),
        ]
        for peer in peers:
            bar.note(peer.name)
            peer.warm(warm)
            run = peer.run(work)
            rows.append(summary(peer.name, [run]))
            tokens.append(run.tokens)
            peer.close()
            bar.done()
        bar.note("tokens of each row alone, to compare")
        reference = generate_alone(loaded.model, work, loaded.pad_id, bar.done)
        for row, made in zip(rows, tokens, strict=True):
            row.update(compare(loaded.model, work, reference, made))
    ours = rows[-1]["tokens_per_second"]
    report = {
        "benchmark": "demo",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "requests": len(work),
        "rows": rows,
        "ratios": {row["engine"]: ours / row["tokens_per_second"] for row in rows[:-1]},
        "tokens_equal": rows[-1]["tokens_equal"],
        "machine": machine(),
    }
    return report, tokens[-1]


NAMES = {
    "hf": "generate, batches of 16",
    "hf-cb": "continuous batching",
    "hf_paged": "hf_paged",
}


def show_table(report: dict[str, Any]) -> None:
    from hf_paged.integrations.cli.tables import percent, table, yes_no

    base = report["rows"][0]["tokens_per_second"]
    shown = [
        [
            NAMES[row["engine"]],
            f"{row['requests']}",
            f"{row['tokens']}",
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / base:.2f}×",
            yes_no(row),
            percent(row["kv_waste"]),
        ]
        for row in report["rows"]
    ]
    where = f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    title = f"{report['model']}, {report['dtype']} on {report['machine']['cuda_device'] or where}"
    columns = ["engine", "prompts", "tokens", "seconds", "tokens/s", "ratio", "equal", "KV waste"]
    notes = "equal: the tokens are those that generate gives each prompt alone. "
    table(title, columns, shown, notes + "KV waste: share of the KV storage held that no live token needs.")


def show_answers(answers: list[dict[str, str]]) -> None:
    out = Console(highlight=False)
    for answer in answers:
        out.print()
        out.print(Text(answer["prompt"], style="dim"), end="")
        out.print(Text(answer["answer"]))
    if answers:
        out.print(Text("\nA small model wrote these: it is here to show that engines agree, not to be right."))
