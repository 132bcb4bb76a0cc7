"""The command tree. Each command's own module is imported when the command runs: `--help` must be quick."""

from __future__ import annotations

import typer

from hf_paged.integrations.cli import (
    bench,
    bench_eval,
    bench_gpu,
    bench_kernels,
    bench_prefix,
    bench_score,
    bench_speculation,
    demo,
    eval,
    generate,
    info,
    lm_eval,
    score,
    tune,
)

app = typer.Typer(
    name="hf-paged",
    help="Paged KV memory and continuous batching for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command(name="demo")(demo.demo)
app.command(name="generate")(generate.generate)
app.command(name="eval")(eval.evaluate)
app.command(name="info")(info.info)
app.command(name="score")(score.score)
app.command(name="tune")(tune.tune)
app.command(name="lm-eval", context_settings=lm_eval.CONTEXT)(lm_eval.lm_eval)
bench.app.command(name="prefix")(bench_prefix.prefix)
bench.app.command(name="eval")(bench_eval.evaluation)
bench.app.command(name="speculation")(bench_speculation.speculation)
bench.app.command(name="kernels")(bench_kernels.kernels)
bench.app.command(name="score")(bench_score.score)
bench.app.command(name="gpu")(bench_gpu.gpu)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of `hf-paged` and of `python -m hf_paged`."""
    app(prog_name="hf-paged")
