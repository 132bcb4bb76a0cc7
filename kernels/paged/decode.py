"""Decode: one query token a row over its page table, in splits of a fixed number of slots.

Dao et al., "Flash-Decoding", 2023. The query heads of a KV head make one tile (Ainslie et al., "GQA", 2023), so keys
and values are read once. How a row is split depends on the row alone, so its result does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, TileConfig, head_shape, tile_constants
from hf_paged.kernels.overlap import admit_next, await_others, overlap
from hf_paged.kernels.reduce import merge_constants, store_merged
from hf_paged.kernels.tiles import attend, normalised

LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["rows", "width", "splits", "window"])
def decode_kernel(
    query,
    key_pages,
    value_pages,
    table,
    context,
    sinks,
    out,
    parts,
    stats,
    arrived,
    rows,
    width,
    splits,
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
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of one row and KV head. Of several splits the program that ends last merges all parts, in their order.

    `parts` and `stats` are float32 `[rows, splits, heads, value_dim]` and `[rows, splits, heads, 2]`; `arrived` int32
    `[rows, kv_heads]`: splits that are done, 0 before and after.
    """
    await_others(OVERLAP)
    pid = tl.program_id(0)
    head = pid % KV_HEADS
    row = (pid // KV_HEADS) % rows
    split = pid // (KV_HEADS * rows)
    length = tl.load(context + row)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    count = tl.cdiv(length - first, SPLIT)
    start = first + split * SPLIT
    if (start >= length) & (split > 0):
        return
    stop = tl.minimum(start + SPLIT, length)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    heads = head * GROUP + m
    at = query + row.to(tl.int64) * stride_token + heads[:, None] * stride_head + d[None, :]
    tile = tl.load(at, mask=(m < GROUP)[:, None] & (d < KEY_DIM)[None, :], other=0.0)
    high = tl.full([BLOCK_M], 0, tl.int32) + length
    acc, most, total = attend(
        tl.zeros([BLOCK_M, BLOCK_V], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tile,
        key_pages + head * (PAGE_SIZE * KEY_DIM),
        value_pages + head * (PAGE_SIZE * VALUE_DIM),
        table + row.to(tl.int64) * width,
        start,
        stop,
        high - window,
        high,
        high,
        high,
        scale,
        cap,
        KV_HEADS,
        PAGE_SIZE,
        KEY_DIM,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
        True,
        WINDOWED,
        False,
        CAPPED,
        PRECISION,
        STAGES,
    )
    admit_next(OVERLAP)
    kept = (m < GROUP)[:, None] & (v < VALUE_DIM)[None, :]
    if count <= 1:
        sink = most
        if SINKS:
            sink = tl.load(sinks + heads, mask=m < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
        done = normalised(acc, most, total, sink, SINKS)
        line = row.to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(out + line[:, None] * VALUE_DIM + v[None, :], done.to(out.dtype.element_ty), mask=kept)
    else:
        line = (row.to(tl.int64) * splits + split) * (KV_HEADS * GROUP) + heads
        tl.store(parts + line[:, None] * VALUE_DIM + v[None, :], acc, mask=kept)
        tl.store(stats + line * 2, most, mask=m < GROUP)
        tl.store(stats + line * 2 + 1, total, mask=m < GROUP)
        tl.debug_barrier()  # all of the part is written before it is said to be there
        flag = arrived + row * KV_HEADS + head
        if tl.atomic_add(flag, 1, sem="acq_rel") == count - 1:
            tl.store(flag, 0)
            # fmt: off
            store_merged(
                parts, stats, row * splits, 1, count, row, head,
                sinks, out, GROUP, KV_HEADS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_P, SINKS,
            )
            # fmt: on


def decode(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    table: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    arrived: torch.Tensor,
    config: TileConfig,
    *,
    longest: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one query a row, into `out`.

    Args:
        query: `[rows, heads, head_dim]`, elements of a head one after another.
        key_pages, value_pages: `[num_pages, kv_heads, page_size, dim]`, contiguous.
        table: int32 `[rows, width]`, contiguous; read only as far as a row's slots go.
        context: int32 `[rows]`, slots that each row sees; a row of 0 gets zeros.
        out: `[rows, heads, value_dim]`, contiguous.
        arrived: int32, `rows * kv_heads` zeros, which are left so; calls that share them must follow each other.
        longest: at least the largest of `context`: the grid holds splits for so many slots.
    """
    rows, heads, _ = query.shape
    _, kv_heads, _, value_dim = value_pages.shape
    seen = longest if window is None else min(longest, window + config.block_n)
    splits = max(1, -(-seen // config.split))
    parts, stats = part_buffers(rows * splits if splits > 1 else 0, heads, value_dim, query.device)
    shape = head_shape(heads, key_pages, value_pages)
    chosen = dict(windowed=window is not None, sinks=sinks is not None)
    sinks = out if sinks is None else sinks  # stands for what is not read
    decode_kernel[(rows * kv_heads * splits,)](
        query,
        key_pages,
        value_pages,
        table,
        context,
        sinks,
        out,
        parts,
        stats,
        arrived,
        rows,
        table.shape[1],
        splits,
        window or 0,
        scale if softcap is not None else scale * LOG2E,
        softcap or 0.0,
        *query.stride()[:2],
        **decode_constants(shape, config, capped=softcap is not None, **chosen),
        **overlap(query.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def decode_constants(shape: HeadShape, config: TileConfig, *, windowed: bool, capped: bool, sinks: bool) -> dict:
    """What `decode_kernel` is compiled for."""
    return {
        **tile_constants(shape, config),
        **merge_constants(shape),
        "SPLIT": config.split,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SINKS": sinks,
    }


def part_buffers(lines: int, heads: int, value_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of `lines` queries: float32 `[lines, heads, value_dim]` and `[lines, heads, 2]`."""
    parts = torch.empty(lines, heads, value_dim, dtype=torch.float32, device=device)
    return parts, torch.empty(lines, heads, 2, dtype=torch.float32, device=device)
