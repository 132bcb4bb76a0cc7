"""Extend: ragged queries of any length over their rows' pages: chunks of prompts, chains and trees of drafts.

A tile holds some queries of a row times the query heads of a KV head. Tiles over slots that all its queries see need no
mask; the last ones, and those at a window's edge, take one. Dao, "FlashAttention-2", 2023; for drafts that branch, Miao
et al., "SpecInfer", 2024: a query's ancestors are bits of a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, TileConfig, head_shape, tile_constants
from hf_paged.kernels.overlap import admit_next, await_others, overlap
from hf_paged.kernels.reduce import part_buffers, store_part, store_result
from hf_paged.kernels.tiles import attend, scaling
from hf_paged.kernels.worklist import WorkList


@triton.jit(do_not_specialize=["width", "window"])
def extend_kernel(
    query,
    key_pages,
    value_pages,
    table,
    items,
    seen,
    sinks,
    out,
    parts,
    stats,
    arrived,
    width,
    window,
    scale,
    cap,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WINDOWED: tl.constexpr,
    TREE: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One item of the work list (`worklist.py` has its fields) and one KV head. Of a tile's parts the program that ends
    last merges all, in their order.

    `seen` is int64 `[tokens, 4]`: low, high, base and visible bits of each query (read with `TREE`). `parts` and
    `stats` are float32 `[lines, heads, value_dim]` and `[lines, heads, 2]`; `arrived` int32 `[tiles, kv_heads, 2]`:
    first, parts that are done, 0 before and after.
    """
    await_others(OVERLAP)
    pid = tl.program_id(0)
    head = pid % KV_HEADS
    item = items + (pid // KV_HEADS) * 12
    row = tl.load(item)
    token = tl.load(item + 1)
    count = tl.load(item + 2)
    own = tl.load(item + 3)
    start = tl.load(item + 4)
    clear = tl.load(item + 5)
    full = tl.load(item + 6)
    stop = tl.load(item + 7)
    part = tl.load(item + 8)
    first = tl.load(item + 9)
    pieces = tl.load(item + 10)
    tile_index = tl.load(item + 11)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    place = m // GROUP
    real = place < count
    heads = head * GROUP + m % GROUP
    tokens = (token + place).to(tl.int64)
    at = query + tokens[:, None] * stride_token + heads[:, None] * stride_head + d[None, :]
    tile = tl.load(at, mask=real[:, None] & (d < KEY_DIM)[None, :], other=0.0)
    # Lines that are no queries see what the first query sees: a window's edge is the least of all lines'.
    high = tl.where(real, own + place, own)
    low = high - window
    base = high
    visible = high
    if TREE:
        mine = seen + tl.where(real, tokens, token) * 4
        low = tl.load(mine).to(tl.int32)
        high = tl.load(mine + 1).to(tl.int32)
        base = tl.load(mine + 2).to(tl.int32)
        visible = tl.load(mine + 3)
    keys = key_pages + head * (PAGE_SIZE * KEY_DIM)
    values = value_pages + head * (PAGE_SIZE * VALUE_DIM)
    line = table + row.to(tl.int64) * width
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # fmt: off
    if WINDOWED:
        acc, most, total = attend(
            acc, most, total, tile, keys, values, line, start, clear, low, high, base, visible, scale, cap, KV_HEADS,
            PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, True, True, TREE, CAPPED, PRECISION, STAGES,
        )
    acc, most, total = attend(
        acc, most, total, tile, keys, values, line, clear, full, low, high, base, visible, scale, cap, KV_HEADS,
        PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, False, False, False, CAPPED, PRECISION, STAGES,
    )
    acc, most, total = attend(
        acc, most, total, tile, keys, values, line, full, stop, low, high, base, visible, scale, cap, KV_HEADS,
        PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, True, WINDOWED, TREE, CAPPED, PRECISION, STAGES,
    )
    # fmt: on
    admit_next(OVERLAP)
    kept = real[:, None] & (v < VALUE_DIM)[None, :]
    last = part < 0
    if part >= 0:
        to = (part + place).to(tl.int64) * (KV_HEADS * GROUP) + heads
        store_part(parts, stats, to, acc, most, total, real, VALUE_DIM, BLOCK_V)
        flag = arrived + (tile_index * KV_HEADS + head) * 2
        last = tl.atomic_add(flag, 1, sem="acq_rel") == pieces - 1
        if last:
            tl.store(flag, 0)
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            most = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for piece in range(pieces):
                of = (first + piece * count + place).to(tl.int64) * (KV_HEADS * GROUP) + heads
                values_of = tl.load(parts + of[:, None] * VALUE_DIM + v[None, :], mask=kept, other=0.0)
                peak_of = tl.load(stats + of * 2, mask=real, other=float("-inf"))
                peak = tl.maximum(most, peak_of)
                around = tl.where(peak == float("-inf"), 0.0, peak)
                weight = tl.exp2(peak_of - around)
                fade = tl.exp2(most - around)
                total = total * fade + tl.load(stats + of * 2 + 1, mask=real, other=0.0) * weight
                acc = acc * fade[:, None] + values_of * weight[:, None]
                most = peak
    if last:
        to = tokens * (KV_HEADS * GROUP) + heads
        store_result(out, to, acc, most, total, sinks, heads, real, VALUE_DIM, BLOCK_V, SINKS)


def extend(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    table: torch.Tensor,
    work: WorkList,
    out: torch.Tensor,
    config: TileConfig,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of the queries that `work` names, into `out`.

    Args:
        query: `[tokens, heads, head_dim]`, elements of a head one after another.
        key_pages, value_pages: `[num_pages, kv_heads, page_size, dim]`, contiguous; they hold the queries' own keys.
        table: int32 `[rows, width]`, contiguous.
        work: made for `config` and `window`.
        out: `[tokens, heads, value_dim]`, contiguous; lines of other queries stay as they are.
    """
    heads = query.shape[1]
    _, kv_heads, _, value_dim = value_pages.shape
    parts, stats = part_buffers(work.lines, heads, value_dim, query.device)
    shape = head_shape(heads, key_pages, value_pages)
    nothing = out  # stands for what is not read
    chosen = dict(windowed=window is not None, sinks=sinks is not None)
    sinks = nothing if sinks is None else sinks
    extend_kernel[(len(work.items) * kv_heads,)](
        query,
        key_pages,
        value_pages,
        table,
        work.items,
        nothing if work.seen is None else work.seen,
        sinks,
        out,
        parts,
        stats,
        work.arrived,
        table.shape[1],
        window or 0,
        *scaling(scale, softcap),
        *query.stride()[:2],
        **extend_constants(shape, config, tree=work.seen is not None, capped=softcap is not None, **chosen),
        **overlap(query.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def extend_constants(
    shape: HeadShape, config: TileConfig, *, windowed: bool, tree: bool, capped: bool, sinks: bool
) -> dict:
    """What `extend_kernel` is compiled for."""
    return {
        **tile_constants(shape, config),
        "WINDOWED": windowed,
        "TREE": tree,
        "CAPPED": capped,
        "SINKS": sinks,
    }
