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
    decode_programs,
    fetches_ahead,
    full_splits,
    head_shape,
    overlaps,
    power_of_two,
    shares,
    tile_constants,
    with_softcap,
)
from hf_paged.kernels.merge import merge_parts, merging_constants
from hf_paged.kernels.overlap import admit_next, await_others, overlap
from hf_paged.kernels.reduce import merge_constants, part_buffers, store_merged, store_part, store_result
from hf_paged.kernels.splits import count_on_card, follows, most_splits, size_on_card
from hf_paged.kernels.tiles import attend, load_pages, scaling
from hf_paged.kernels.tiles_ahead import attend_ahead, fetch_queries
from hf_paged.kernels.tiles_apart import attend_apart, slots_apart


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
    order,
    common,
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
    MEMBERS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of one row (see `splits.py`) and KV head; the program that ends last merges a row's, in their order.

    With `MEMBERS`, one split of up to so many rows that have it in common, which is read once. With `AHEAD`, programs
    are few (see `fetches_ahead`), and `merge.py` merges their parts.

    `parts` and `stats` are float32 `[rows, splits, heads, value_dim]` and `[rows, splits, heads, 2]`; `arrived` int32
    `[rows, kv_heads]`: splits that are done, 0 before and after. `context` is read while the kernel ahead still runs,
    which stores new keys and values at most.
    """
    pid = tl.program_id(0)
    head = pid % KV_HEADS
    row = (pid // KV_HEADS) % rows
    place = row
    split = pid // (KV_HEADS * rows)
    m = tl.arange(0, BLOCK_M)
    heads = head * GROUP + m
    real = m < GROUP
    members = 1
    mine = row
    if MEMBERS > 1:
        j = tl.arange(0, MEMBERS)
        chain = follows(order, common, context, place + j, split, rows, PAGE_SIZE, SPLIT, FULL, BLOCK_N)
        if (tl.sum(((j == 0) & chain).to(tl.int32), 0) > 0) & (place % MEMBERS != 0):
            return  # a row before this one reads it for both
        members = tl.minimum(tl.min(tl.where(chain | (j == 0), MEMBERS, j), 0), MEMBERS - place % MEMBERS)
        row = tl.load(order + place)
        heads = head * GROUP + m % BLOCK_G
        real = (m % BLOCK_G < GROUP) & (m // BLOCK_G < members)
        mine = tl.load(order + place + m // BLOCK_G, mask=real, other=0)
    length = tl.load(context + row)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    size = size_on_card(length - first, SPLIT, FULL, BLOCK_N)
    count = count_on_card(length - first, size)
    if split >= count:
        return
    start = first + split * size
    stop = tl.where(split + 1 == count, length, start + size)
    d = tl.arange(0, BLOCK_D)
    own_query = query + mine.to(tl.int64) * stride_token
    keys = key_pages + head * (PAGE_SIZE * KEY_DIM)
    values = value_pages + head * (PAGE_SIZE * VALUE_DIM)
    own_table = table + row.to(tl.int64) * width
    # fmt: off
    if AHEAD:
        fetch_queries(own_query + tl.where(real, heads, head * GROUP) * stride_head, KEY_DIM, OVERLAP)
        at = (own_query + heads * stride_head)[None, :] + d[:, None]
        at = tl.broadcast_to(at[None, :, :], (2 * SHARES, BLOCK_D, BLOCK_M))
        real_at = tl.broadcast_to(real[None, None, :], (2 * SHARES, BLOCK_D, BLOCK_M))
        acc, most, total = attend_ahead(
            at, real_at, keys, values, own_table, start, stop, stop == length, scale, window,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, SHARES, STAGES, OVERLAP,
        )
        acc = tl.trans(acc)
    elif SHARES > 1:
        pages = load_pages(own_table, start + slots_apart(BLOCK_N, SHARES), stop, PAGE_SIZE)
        at = (own_query + heads * stride_head)[None, :] + d[:, None]
        at = tl.broadcast_to(at[None, :, :], (SHARES, BLOCK_D, BLOCK_M))
        real_at = tl.broadcast_to(real[None, None, :], (SHARES, BLOCK_D, BLOCK_M))
        acc, most, total = attend_apart(
            at, real_at, keys, values, own_table, pages, start, stop, length - window, stop == length, scale, cap,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, SHARES, WINDOWED, CAPPED, PRECISION, STAGES,
            OVERLAP,
        )
        acc = tl.trans(acc)
    else:
        await_others(OVERLAP)
        at = (own_query + heads * stride_head)[:, None] + d[None, :]
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
        admit_next(OVERLAP)
    # fmt: on
    HEADS: tl.constexpr = KV_HEADS * GROUP
    if AHEAD:
        line = (mine.to(tl.int64) * splits + split) * HEADS + heads
        store_part(parts, stats, line, acc, most, total, real, VALUE_DIM, BLOCK_V)
    elif count <= 1:
        line = mine.to(tl.int64) * HEADS + heads
        store_result(out, line, acc, most, total, sinks, heads, real, VALUE_DIM, BLOCK_V, SINKS)
    else:
        line = (mine.to(tl.int64) * splits + split) * HEADS + heads
        store_part(parts, stats, line, acc, most, total, real, VALUE_DIM, BLOCK_V)
        for member in range(members):
            if MEMBERS > 1:
                row = tl.load(order + place + member)
                length = tl.load(context + row)
                count = count_on_card(length, size)
            flag = arrived + row * KV_HEADS + head
            WHOLE: tl.constexpr = OVERLAP and key_pages.dtype.element_ty == tl.float8e4nv  # as `merge.py` has it
            if tl.atomic_add(flag, 1, sem="acq_rel") == count - 1:
                tl.store(flag, 0)
                # fmt: off
                store_merged(
                    parts, stats, row * splits, count, row, head,
                    sinks, out, GROUP, KV_HEADS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_P, SINKS, WHOLE,
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
    shared: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        shared: which rows have pages in common, `(order, common)`, int32 `[rows]` (see `shared_pages`).
        longest: at least the largest of `context`: the grid holds splits for so many slots.
    """
    rows, heads, _ = query.shape
    _, kv_heads, _, value_dim = value_pages.shape
    seen = longest if window is None else min(longest, window + config.block_n)
    shape = head_shape(heads, key_pages, value_pages)
    target = target_of(query.device)
    config = config if softcap is None else with_softcap(config)
    narrow = key_pages.dtype == FP8
    splits = most_splits(
        seen, config.split, full_splits(shape, target, decode_programs(target, narrow)), config.block_n
    )
    parts, stats = part_buffers(rows * splits if splits > 1 else 0, heads, value_dim, query.device)
    chosen = dict(windowed=window is not None, sinks=sinks is not None, shared=shared is not None and splits > 1)
    plain = window is None and softcap is None and not chosen["shared"] and splits > 1
    few = plain and narrow and fetches_ahead(shape, config, target, query.element_size(), rows * kv_heads * splits)
    constants = decode_constants(shape, config, target, capped=softcap is not None, narrow=narrow, ahead=few, **chosen)
    decode_kernel[(rows * kv_heads * splits,)](
        query,
        key_pages,
        value_pages,
        table,
        context,
        out if sinks is None else sinks,  # stands for what is not read
        out,
        parts,
        stats,
        arrived,
        *(shared or (context, context)),
        rows,
        table.shape[1],
        splits,
        window or 0,
        *scaling(scale, softcap),
        *query.stride()[:2],
        **constants,
        **overlap(query.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if few:
        merging = merging_constants(shape, config, constants["FULL"], sinks is not None)
        merge_parts(context, sinks, out, parts, stats, merging)


def decode_constants(
    shape: HeadShape,
    config: TileConfig,
    target: Target,
    *,
    windowed: bool,
    capped: bool,
    sinks: bool,
    narrow: bool = False,
    shared: bool = False,
    ahead: bool = False,
) -> dict:
    """What `decode_kernel` is compiled for. `narrow`: for pages in fp8. `shared`: rows may have splits in common.
    `ahead`: programs are few, see `fetches_ahead`.

    These are read once where warps share a tile, and there is no window, which begins elsewhere in each row.
    """
    parts = shares(shape, config, target)
    shared = shared and parts > 1 and not windowed
    columns = 16 if shared and overlaps(target) else 8  # on other cards 16 take more registers than there are
    block_m = columns if parts > 1 else config.block_m
    return {
        **tile_constants(shape, config),
        **merge_constants(shape),
        "BLOCK_M": block_m,
        "MEMBERS": block_m // power_of_two(shape.group) if shared else 1,
        "SPLIT": config.split,
        "FULL": full_splits(shape, target, decode_programs(target, narrow)),
        "SHARES": parts,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SINKS": sinks,
        "AHEAD": ahead,
    }
