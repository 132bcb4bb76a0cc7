"""Paged attention and the storing of KV by Triton kernels: tensors are checked here, a step is taken apart here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from hf_paged.kernels.backends import with_extend
from hf_paged.kernels.card import target_of
from hf_paged.kernels.check import check_heads, require
from hf_paged.kernels.decode import decode
from hf_paged.kernels.extend import extend
from hf_paged.kernels.fp8 import FP8
from hf_paged.kernels.launch import (
    HeadShape,
    Target,
    TileConfig,
    few_lines,
    head_shape,
    prefill_config,
    reads_fp8,
    unsupported,
)
from hf_paged.kernels.rows import ALL, PagedRows
from hf_paged.kernels.seen import Seen, build_seen
from hf_paged.kernels.tuned import KINDS, tiles_of
from hf_paged.kernels.worklist import StepTensors, step_tensors, work_list
from hf_paged.kernels.write_triton import write

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reads(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels take pages of such numbers."""
    return reads_fp8(target_of(device)) if dtype == FP8 else dtype in DTYPES


def serves(heads: int, key_pages: torch.Tensor, value_pages: torch.Tensor) -> bool:
    """Whether the kernels take such pages under so many query heads."""
    alike = key_pages.dtype == value_pages.dtype and reads(key_pages.dtype, key_pages.device)
    return alike and unsupported(head_shape(heads, key_pages, value_pages)) is None


def check(query: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, scale: float = 1.0) -> None:
    """Refuse what would give wrong numbers.

    Raises:
        ValueError: dtypes or dims do not go together, pages are not contiguous, or the scale is not over 0.
    """
    require(scale > 0, "scale", scale, "a number over 0")
    _require_dtype("query.dtype", query.dtype, key_pages.dtype)
    interpreted = query.device.type == "cpu" and key_pages.dtype == torch.bfloat16
    require(
        not interpreted,
        "key_pages.dtype",
        key_pages.dtype,
        "Triton's interpreter multiplies it wrongly; float16 or float32",
    )
    check_heads(query, key_pages)
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        require(pages.is_contiguous(), f"{name}.stride()", pages.stride(), "contiguous pages")


def check_new(key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor) -> None:
    """The same for new keys and values."""
    check(key, key_pages, value_pages)
    _require_dtype("value.dtype", value.dtype, value_pages.dtype)
    wanted = (*key.shape[:2], value_pages.shape[-1])
    require(value.shape == wanted, "value.shape", tuple(value.shape), f"{wanted}")


def _require_dtype(name: str, dtype: torch.dtype, pages: torch.dtype) -> None:
    """Numbers to compute with, and those in pages: alike, or any and fp8."""
    if pages == FP8:
        require(dtype in DTYPES, name, dtype, "float32, float16 or bfloat16")
    else:
        require(dtype == pages, name, dtype, f"that of the pages, {pages}")


def write_kv(key, value, key_pages, value_pages, rows: PagedRows) -> None:
    """See `hf_paged.kernels.write_kv`."""
    if len(key):
        slots = rows.slots.contiguous()
        write(_inner(key), _inner(value), key_pages, value_pages, slots)


def paged_attention(
    query,
    key_pages,
    value_pages,
    rows: PagedRows,
    *,
    scale,
    window=None,
    softcap=None,
    sinks=None,
    fresh=None,
    tiles: Callable[[str, HeadShape, Target], TileConfig] | None = None,
) -> torch.Tensor:
    """See `hf_paged.kernels.paged_attention`. `fresh` is not looked at: it lies in pages as well.

    Args:
        tiles: how kernels are launched. Default: `tiles_of`.
    """
    query, device, n = _inner(query), query.device, rows.num_decodes
    tokens, heads, _ = query.shape
    tiles = tiles or tiles_of
    out = query.new_empty(tokens, heads, value_pages.shape[-1])
    step: StepTensors = rows.derived(("step", device), lambda: step_tensors(rows, device))
    shape, target = head_shape(heads, key_pages, value_pages, query.element_size()), target_of(device)
    options = dict(scale=scale, window=window, softcap=softcap, sinks=None if sinks is None else sinks.contiguous())
    if n:
        longest = rows.derived("longest", lambda: int(rows.context_lens[:n].max()))
        config = tiles("decode", shape, target)
        lines = n * shape.kv_heads
        arrived = rows.derived(("arrived", lines), lambda: torch.zeros(lines, dtype=torch.int32, device=device))
        given = query[:n], key_pages, value_pages, step.table, step.context, out[:n], arrived
        shared = None if step.order is None else (step.order, step.common)
        decode(*given, config, longest=longest, shared=shared, **options)
    if n < tokens:
        alone = prefill_config(shape, target) if tiles is tiles_of and _prefills(query, key_pages) else None
        for kind in KINDS[1:] if alone is None else (*KINDS[1:], "prefill"):
            config = alone if kind == "prefill" else tiles(kind, shape, target)

            def work(kind=kind, config=config):
                chosen = _chosen(rows, kind, few_lines(shape, target) // shape.group, alone is not None)
                branches = None if kind == "prefill" else _branches(rows, window)
                return work_list(rows, chosen, config, shape, window, branches, device)

            items = rows.derived(("work", window, shape, config, kind, alone), work)
            if items is not None:
                run = _prefill if kind == "prefill" else extend
                run(query, key_pages, value_pages, step.table, items, out, config, **options)
    return out


def _prefills(query: torch.Tensor, pages: torch.Tensor) -> bool:
    """Whether `prefill.py` can run: Gluon has no interpreter."""
    return query.is_cuda and query.dtype == pages.dtype


def _prefill(*args, **options) -> None:
    """`prefill`, or `extend` of the same tiles."""

    def run(*args, **options):
        from hf_paged.kernels.prefill import prefill

        prefill(*args, **options)

    def instead(*tensors, **options):
        *tensors, config = tensors
        extend(*tensors, replace(config, warps=8), **options)

    with_extend(run, instead, *args, **options)


def _chosen(rows: PagedRows, kind: str, few_queries: int, prefills: bool) -> np.ndarray:
    """Places of the rows behind the decodes that a kernel takes: few queries, many, or, where `prefill.py` can be
    used, many and no drafts that branch."""
    few = rows.query_lens <= max(few_queries, 1)
    plain = np.full(len(few), prefills)
    if prefills and rows.tree is not None:
        branching = np.repeat(np.arange(len(few)), rows.query_lens)[rows.tree.visible != ALL]
        plain[branching] = False
    mine = {"few": few, "many": ~few & ~plain, "prefill": ~few & plain}[kind]
    mine[: rows.num_decodes] = False
    return np.flatnonzero(mine)


def _branches(rows: PagedRows, window: int | None) -> Seen | None:
    """What each query sees, where drafts branch."""
    if rows.tree is None or (rows.tree.visible == ALL).all():
        return None
    return rows.derived(("seen", window), lambda: build_seen(rows, window))


def _inner(x: torch.Tensor) -> torch.Tensor:
    """`x` with the elements of a head one after another."""
    return x if x.stride(-1) == 1 else x.contiguous()
