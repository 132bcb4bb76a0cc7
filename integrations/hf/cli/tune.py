"""`hf-paged tune`: measure how the attention kernels are best launched on this card, and keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import write_report
from hf_paged.integrations.cli.bench_kernels import DTYPES
from hf_paged.integrations.cli.console import Bar, check_writable, command
from hf_paged.integrations.cli.tables import table


@command
def tune(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub name of a model, for its heads.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=16, help="Elements of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    out: Annotated[
        Path | None, typer.Option(help="The file to keep them in. Default: where engines look for this card's.")
    ] = None,
    repeats: opt.Repeats = 5,
    json_out: opt.JsonOut = None,
) -> None:
    """Measure how the attention kernels are best launched on this card, for one shape of heads, and keep it.

    Some hundred configurations are compiled, compared with float64 and timed: ten minutes or so. Engines that begin
    afterwards use what was kept; `HF_PAGED_TILES` names another file, or with nothing in it none. Texts may come out
    otherwise where two tokens are as good as equal, as on another card.
    """
    import torch

    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.kernels import Scale
    from hf_paged.integrations.bench.tune import run_tune
    from hf_paged.kernels.card import target_of
    from hf_paged.kernels.tuned import table_path, write_table

    check_writable(json_out)
    if not torch.cuda.is_available():
        raise BadInput("tune needs a GPU that torch can use; torch.cuda.is_available() is False")
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if model is not None:
        heads, kv_heads, head_dim = heads_of(model)
    if heads % kv_heads:
        raise BadInput(f"--heads {heads}: a multiple of --kv-heads {kv_heads}")
    target = target_of(torch.device("cuda"))
    path = out or table_path(target)
    if path is None:
        raise BadInput("HF_PAGED_TILES is set to nothing: name a file with --out")
    with Bar() as bar:
        report, tiles = run_tune(Scale(heads, kv_heads, head_dim, dtype=getattr(torch, dtype), repeats=repeats), bar)
    if tiles:
        write_table(path, target, tiles)
    if json_out != "-":
        show_tuned(report)
        typer.echo(f"kept in {path}" if tiles else "nothing is faster than what is worked out: nothing is kept")
    write_report(report, json_out)


def heads_of(model: str) -> tuple[int, int, int]:
    """Query heads, KV heads and elements of a head, from a model's config.

    Raises:
        BadInput: there is none, or it does not say.
    """
    from transformers import AutoConfig

    from hf_paged.integrations.bench.data import BadInput

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"--model {model}: {error}") from None


def show_tuned(report: dict[str, Any]) -> None:
    """The report as a table."""
    rows = []
    for kind, found in report["kernels"].items():
        best = found["chosen"]
        rows.append(
            [
                kind,
                f"{best['block_m']} × {best['block_n']}",
                f"{best['split']}",
                f"{best['warps']} / {best['stages']}",
                f"{found['seconds'] * 1e6:.0f}",
                f"{found['worked_out_seconds'] / found['seconds']:.2f}×",
                f"{found['tried']} ({len(found['failed'])} failed)",
            ]
        )
    titles = ["kernel", "tile", "split", "warps / stages", "µs", "speed", "tried"]
    table(f"Tiles for {report['card']['arch']}, heads {report['heads']}, {report['dtype']}", titles, rows)
