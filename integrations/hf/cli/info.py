"""`hf-paged info`: versions, the backend and why, and the memory plan for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.console import command, print_json, quiet_transformers, settings_of

if TYPE_CHECKING:
    import torch


@command
def info(
    model: opt.Model = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    memory_fraction: opt.MemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
    kv_dtype: opt.KvDtype = None,
    backend: opt.Backend = None,
) -> None:
    """Versions, the backend chosen and why, and what memory a model's KV may take."""
    given = locals()
    from hf_paged.integrations.bench.data import BadInput
    from hf_paged.integrations.bench.machine import machine
    from hf_paged.integrations.bench.models import bundled, check_device, check_model_name
    from hf_paged.kernels import choose_backend

    settings = settings_of(given)
    chosen, reason = choose_backend(settings.get("backend", "auto"), check_device(device).type)
    report: dict[str, Any] = {"machine": machine(), "backend": chosen, "backend_reason": reason, "memory_plan": None}
    if chosen == "triton":
        report["tiles"] = tiles_told(check_device(device))
    if model is None:
        try:
            model = bundled("models/target")
        except BadInput:
            report["note"] = "no --model given, so there is no memory plan"
    if model is not None:
        report["memory_plan"] = plan(check_model_name(model), dtype, device, settings)
    if as_json:
        print_json(report)
    else:
        show(report)


def tiles_told(device: torch.device) -> str:
    """Where launches of the Triton kernels come from."""
    from hf_paged.kernels.card import target_of
    from hf_paged.kernels.tuned import table_of, table_path

    target = target_of(device)
    known = table_of(target)
    return f"{len(known)} measured, in {table_path(target)}" if known else "worked out (hf-paged tune measures them)"


def plan(model: str, dtype: str, device: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What an engine for this model would take.

    Raises:
        BadInput: if the model cannot be loaded. CannotDrive: if the engine cannot drive it.
    """
    from hf_paged.config import EngineConfig
    from hf_paged.integrations.bench.models import load
    from hf_paged.integrations.inspect import model_facts
    from hf_paged.integrations.sizing import kv_dtype, pool_pages
    from hf_paged.store import KVStore

    quiet_transformers()
    loaded = load(model, dtype, device)
    config = EngineConfig.from_dict(settings)
    facts = model_facts(loaded.model)
    page_bytes = KVStore.page_bytes(list(facts.layers), config.page_size, kv_dtype(config, facts))
    pages = pool_pages(config, facts)
    longest = config.max_model_len or facts.max_positions
    return {
        "model": model,
        "architecture": type(loaded.model).__name__,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "device": str(facts.device),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "layers": len(facts.layers),
        "page_size": config.page_size,
        "page_bytes": page_bytes,
        "token_bytes": page_bytes // config.page_size,
        "pages": pages,
        "limit_bytes": pages * page_bytes,
        "limit_tokens": pages * config.page_size,
        "max_model_len": longest,
        "longest_rows_that_fit": pages * config.page_size // longest if longest else None,
    }


def show(report: dict[str, Any]) -> None:
    """The report as text."""
    out = Console(highlight=False, soft_wrap=True)
    told = report["machine"]
    for name, version in told["versions"].items():
        out.print(f"{name:<14}{version or 'not installed'}")
    cuda = told["cuda_device"] or "none"
    out.print(f"{'cpu':<14}{told['cpu']}, {told['cores']} cores, {told['torch_threads']} torch threads")
    out.print(f"{'cuda':<14}{cuda}")
    out.print(f"{'backend':<14}{report['backend']}: {report['backend_reason']}")
    if "tiles" in report:
        out.print(f"{'tiles':<14}{report['tiles']}")
    if report["memory_plan"] is None:
        typer.echo(report["note"])
        return
    found = report["memory_plan"]
    size = f"{found['parameters'] / 1e6:.1f}M parameters, {found['layers']} layers"
    out.print(f"\n{'model':<14}{found['model']}")
    out.print(f"{'':<14}{found['architecture']}, {size}, {found['dtype']} on {found['device']}")
    page = f"{found['page_size']} tokens, {found['page_bytes'] / 1024:.0f} KiB ({found['token_bytes']} bytes a token)"
    out.print(f"{'page':<14}{page}")
    grown = " taken as it is used" if found["device"] == "cpu" else " taken at once"
    out.print(f"{'pool':<14}{found['pages']} pages: at most {found['limit_bytes'] / 2**30:.2f} GiB,{grown}")
    rows = found["longest_rows_that_fit"]
    if rows is not None:
        out.print(f"{'rows':<14}{rows} of {found['max_model_len']} tokens fit at once")
