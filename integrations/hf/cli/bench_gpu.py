"""`hf-paged bench gpu`: whole models of random weights on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.bench import write_report
from hf_paged.integrations.cli.console import Bar, check_writable, command
from hf_paged.integrations.cli.tables import percent, table


@command
def gpu(
    shapes: Annotated[str | None, typer.Option(help="Of those that run by default, with commas.")] = None,
    requests: Annotated[int | None, typer.Option("--requests", "-n", min=1, help="Requests, of every shape.")] = None,
    prompt: Annotated[int | None, typer.Option(min=2, help="Tokens in, a request.")] = None,
    output: Annotated[int | None, typer.Option(min=2, help="Tokens out, a request.")] = None,
    peers: Annotated[bool | None, typer.Option(help="Run transformers' own ways too; by default for 0.6b.")] = None,
    json_out: opt.JsonOut = None,
) -> None:
    """The engine over models of known shapes with random weights, on a GPU.

    Of each: a decode step of 32 rows over 1k slots, as a multiple of the time that a copy of its weights and KV takes;
    how long the GPU waits for the host; tokens a second of a batch of requests, greedy and sampled; the same compiled,
    where the model's own forward runs; and transformers' `generate` (batches of 32) and continuous batching over the
    first 64 of them.
    """
    import torch

    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.gpu import LOADS, Load, run_gpu

    check_writable(json_out)
    if not torch.cuda.is_available():
        raise BadInput("bench gpu needs a GPU that torch can use; torch.cuda.is_available() is False")
    known = {load.shape: load for load in LOADS}
    names = shapes.split(",") if shapes else list(known)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise BadInput(f"--shapes {','.join(wrong)}: of {', '.join(known)}")

    def asked(load: Load) -> Load:
        given = {"requests": requests, "prompt": prompt, "output": output}
        if peers is not None:
            given["peers"] = ("hf", "hf-cb") if peers else ()
        return replace(load, **{name: value for name, value in given.items() if value is not None})

    with Bar() as bar:
        report = run_gpu([asked(known[name]) for name in names], progress=bar)
    if json_out != "-":
        show_gpu(report)
    write_report(report, json_out)


def show_gpu(report: dict[str, Any]) -> None:
    """The report as tables."""
    found = report["ceilings"]
    rows = []
    steps = [(model["shape"], model["step"]) for model in report["models"]]
    steps += [(f"{m['shape']}, compiled", m["compiled"]["step"]) for m in report["models"] if "compiled" in m]
    for name, step in steps:
        gap = percent(step["host_gap"]) if "host_gap" in step else "-"
        what = f"{step['rows']} × {step['context']}"
        rows.append([name, what, f"{step['seconds'] * 1e3:.2f}", f"{step['over_roofline']:.2f}×", gap])
    title = f"A decode step; a copy makes {found['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    table(title, ["model", "rows × slots", "ms", "of a copy's time", "host gaps"], rows)
    rows = []
    for model in report["models"]:
        load = f"{model['requests']} × {model['in']} in, {model['out']} out"
        ours = model["greedy"]["tokens_per_second"]
        kinds = {"greedy": model["greedy"], "sampled": model["sampled"], **model["peers"]}
        if "compiled" in model:
            kinds |= {f"{name}, compiled": model["compiled"][name] for name in ("greedy", "sampled")}
        for name, made in kinds.items():
            if "skipped" in made:
                rows.append([model["shape"], load, name, made["skipped"][:40], "", ""])
                continue
            rate = made["tokens_per_second"]
            rows.append([model["shape"], load, name, f"{made['seconds']:.2f}", f"{rate:.0f}", f"{ours / rate:.2f}×"])
    table("Requests", ["model", "load", "engine", "s", "tokens/s", "ours over it"], rows)
