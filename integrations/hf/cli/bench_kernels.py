"""`hf-paged bench kernels`: what paged attention makes of a GPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import write_report
from hf_paged.integrations.cli.console import Bar, check_writable, command
from hf_paged.integrations.cli.tables import percent, table

DTYPES = ("bfloat16", "float16", "float32")


@command
def kernels(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=16, help="Elements of a head.")] = 128,
    page_size: Annotated[int, typer.Option(min=1, max=256, help="Tokens a page.")] = 16,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    repeats: opt.Repeats = 5,
    json_out: opt.JsonOut = None,
) -> None:
    """Paged attention on a GPU, as shares of its copy bandwidth and of its matrix products, measured in the same run.

    Decodes of several shapes, a prompt of 8k (against torch's attention over contiguous KV), verification of drafts
    over the time of a decode, rows that share a prefix; errors are against float64, torch's own beside them. Layers are
    timed in a CUDA graph.
    """
    import torch

    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.kernels import Scale, run_kernels

    check_writable(json_out)
    if not torch.cuda.is_available():
        raise BadInput("bench kernels needs a GPU that torch can use; torch.cuda.is_available() is False")
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    if heads % kv_heads:
        raise BadInput(f"--heads {heads}: a multiple of --kv-heads {kv_heads}")
    scale = Scale(heads, kv_heads, head_dim, page_size, getattr(torch, dtype), repeats=repeats)
    with Bar() as bar:
        report = run_kernels(scale, bar)
    if json_out != "-":
        show_kernels(report)
    write_report(report, json_out)


def show_kernels(report: dict[str, Any]) -> None:
    """The report as tables."""
    found = report["ceilings"]
    rows = [
        [
            f"{row['rows']} × {row['context']}{kind}",
            f"{row['seconds'] * 1e6:.0f}",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            percent(row["share_of_copy"]),
            f"{row['relative_error']:.1e} ({row['sdpa_relative_error']:.1e})",
        ]
        for name, kind in (("decode", ""), ("decode_fp8", " fp8"), ("sweep", ""))
        for row in report[name]
    ]
    title = f"Decode, {report['backend']}; a copy makes {found['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    table(title, ["rows × slots", "µs", "GB/s", "of a copy", "error (torch's)"], rows)
    one = report["prefill"]
    rows = [["ours", f"{one['seconds'] * 1e3:.2f}", f"{one['flops'] / 1e12:.0f}", percent(one["share_of_matmul"])]]
    for name in ("sdpa_flash", "sdpa_cudnn"):
        peer = one[name]
        if "skipped" not in peer:
            share = percent(peer["flops"] / found["matmul_flops"])
            rows.append([name, f"{peer['seconds'] * 1e3:.2f}", f"{peer['flops'] / 1e12:.0f}", share])
    title = f"A prompt of {one['tokens']}; a product makes {found['matmul_flops'] / 1e12:.0f} TFLOP/s"
    table(title, ["", "ms", "TFLOP/s", "of a product"], rows)
    one = report["verify"]
    row = [f"{one['rows']} × {one['tokens']}", f"{one['seconds'] * 1e6:.0f}", f"{one['over_decode']:.2f}×"]
    table(f"Verification over {one['context']} slots", ["rows × tokens", "µs", "a decode's time"], [row])
    one = report["shared"]
    row = [f"{one[name] * 1e6:.0f}" for name in ("seconds", "ungrouped_seconds")] + [f"{one['ratio']:.2f}×"]
    title = f"Decode, {one['rows']} × {one['context']}, of which all share {one['shared']}"
    table(title, ["read once for several, µs", "by each, µs", "ratio"], [row])
