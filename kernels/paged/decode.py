"""Decode: one query token a row over its page table, in splits of about as many slots.

Dao et al., "Flash-Decoding", 2023. The query heads of a KV head make one tile (Ainslie et al., "GQA", 2023), so keys
and values are read once. How a row is split depends on the row alone, so its result does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.card import target_of
from hf_paged.kernels.fp8 import FP8
from hf_paged.kernels.launch import (
    HeadShape,
    Target,
    TileConfig,
    full_splits,
    head_shape,
    shares,
    splits_of,
    tile_constants,
    with_softcap,
)
from hf_paged.kernels.overlap import admit_next, await_others, overlap
from hf_paged.kernels.reduce import merge_constants, store_merged
from hf_paged.kernels.tiles import attend, attend_apart, normalised

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
    FULL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of one row and KV head (see `splits_of`); the program that ends last merges all parts, in their order.

    `parts` and `stats` are float32 `[rows, splits, heads, value_dim]` and `[rows, splits, heads, 2]`; `arrived` int32
    `[rows, kv_heads]`: splits that are done, 0 before and after. `context` is read while the kernel ahead still runs,
    which stores new keys and values at most.
    """
    pid = tl.program_id(0)
    head = pid % KV_HEADS
    row = (pid // KV_HEADS) % rows
    split = pid // (KV_HEADS * rows)
    length = tl.load(context + row)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    slots = length - first
    tiles = tl.cdiv(slots, BLOCK_N)
    count = tl.minimum((slots + SPLIT // 2) // SPLIT, tl.maximum(FULL, (slots + SPLIT) // (2 * SPLIT)))
    count = tl.maximum(count, 1)
    if split >= count:
        return
    # As many tiles to each, the first ones take what is left over.
    start = first + (split * (tiles // count) + tl.minimum(split, tiles % count)) * BLOCK_N
    stop = tl.minimum(start + (tiles // count + (split < tiles % count)) * BLOCK_N, length)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    heads = head * GROUP + m
    own_query = query + row.to(tl.int64) * stride_token
    real = m < GROUP
    keys = key_pages + head * (PAGE_SIZE * KEY_DIM)
    values = value_pages + head * (PAGE_SIZE * VALUE_DIM)
    own_table = table + row.to(tl.int64) * width
    await_others(OVERLAP)
    # Programs over fp8 are so small that those of the next kernel may wait beside them.
    NARROW: tl.constexpr = key_pages.dtype.element_ty == tl.float8e4nv
    if NARROW:
        admit_next(OVERLAP)
    # fmt: off
    if SHARES > 1:
        at = own_query + heads[None, :] * stride_head + d[:, None]
        tile = tl.load(at, mask=real[None, :] & (d < KEY_DIM)[:, None], other=0.0)
        acc, most, total = attend_apart(
            tile, keys, values, own_table, start, stop, length - window, scale, cap, KV_HEADS, PAGE_SIZE, KEY_DIM,
            VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, SHARES, WINDOWED, CAPPED, PRECISION, STAGES,
        )
        acc = tl.trans(acc)
    else:
        at = own_query + heads[:, None] * stride_head + d[None, :]
        tile = tl.load(at, mask=real[:, None] & (d < KEY_DIM)[None, :], other=0.0)
        high = tl.full([BLOCK_M], 0, tl.int32) + length
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc, most, total = attend(
            acc, most, total, tile, keys, values, own_table, start, stop, high - window, high, high, high, scale, cap,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, True, WINDOWED, False, CAPPED,
            PRECISION, STAGES,
        )
    # fmt: on
    if not NARROW:
        admit_next(OVERLAP)
    kept = real[:, None] & (v < VALUE_DIM)[None, :]
    if count <= 1:
        sink = most
        if SINKS:
            sink = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        done = normalised(acc, most, total, sink, SINKS)
        line = row.to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(out + line[:, None] * VALUE_DIM + v[None, :], done.to(out.dtype.element_ty), mask=kept)
    else:
        line = (row.to(tl.int64) * splits + split) * (KV_HEADS * GROUP) + heads
        tl.store(parts + line[:, None] * VALUE_DIM + v[None, :], acc, mask=kept)
        tl.store(stats + line * 2, most, mask=real)
        tl.store(stats + line * 2 + 1, total, mask=real)
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
    shape = head_shape(heads, key_pages, value_pages)
    target = target_of(query.device)
    config = config if softcap is None else with_softcap(config)
    narrow = key_pages.dtype == FP8
    splits = int(splits_of(seen, config.split, full_splits(shape, target, narrow)))
    parts, stats = part_buffers(rows * splits if splits > 1 else 0, heads, value_dim, query.device)
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
        *scaling(scale, softcap),
        *query.stride()[:2],
        **decode_constants(shape, config, target, capped=softcap is not None, narrow=narrow, **chosen),
        **overlap(query.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def decode_constants(
    shape: HeadShape,
    config: TileConfig,
    target: Target,
    *,
    windowed: bool,
    capped: bool,
    sinks: bool,
    narrow: bool = False,
) -> dict:
    """What `decode_kernel` is compiled for. `narrow`: for pages in fp8."""
    parts = shares(shape, config, target)
    return {
        **tile_constants(shape, config),
        **merge_constants(shape),
        "BLOCK_M": 8 if parts > 1 else config.block_m,
        "SPLIT": config.split,
        "FULL": full_splits(shape, target, narrow),
        "SHARES": parts,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SINKS": sinks,
    }


def scaling(scale: float, softcap: float | None) -> tuple[float, float]:
    """`scale` and `cap` as the attention kernels take them: with log2(e) in the scale, unless scores are capped."""
    return (scale * LOG2E, 0.0) if softcap is None else (scale, softcap)


def part_buffers(lines: int, heads: int, value_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of `lines` queries: float32 `[lines, heads, value_dim]` and `[lines, heads, 2]`."""
    parts = torch.empty(lines, heads, value_dim, dtype=torch.float32, device=device)
    return parts, torch.empty(lines, heads, 2, dtype=torch.float32, device=device)
