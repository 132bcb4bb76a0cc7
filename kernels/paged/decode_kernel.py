"""The kernel of `decode`: one split of a row and KV head, read in one of four ways; parts are merged in order."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_paged.kernels.overlap import admit_next, await_others
from hf_paged.kernels.reduce import store_merged, store_part, store_result
from hf_paged.kernels.splits import count_on_card, follows, size_on_card, start_on_card
from hf_paged.kernels.tiles import attend, load_pages
from hf_paged.kernels.tiles_ahead import attend_ahead, fetch_queries
from hf_paged.kernels.tiles_apart import attend_apart, slots_apart
from hf_paged.kernels.tiles_halved import attend_halved


@triton.jit
def members_of(
    order, common, context, place, split, rows,
    PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """Whether a row before the one at `place` of `order` reads this split for both; for how many it does otherwise."""
    j = tl.arange(0, MEMBERS)
    chain = follows(order, common, context, place + j, split, rows, PAGE_SIZE, SPLIT, FULL, BLOCK_N, HALVES)
    read = (tl.sum(((j == 0) & chain).to(tl.int32), 0) > 0) & (place % MEMBERS != 0)
    return read, tl.minimum(tl.min(tl.where(chain | (j == 0), MEMBERS, j), 0), MEMBERS - place % MEMBERS)


@triton.jit
def columns(at, real, COPIES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Queries that begin `at` `[M]`, those that are `real`, as columns of `COPIES` products: `[COPIES, D, M]`."""
    at = at[None, :] + tl.arange(0, BLOCK_D)[:, None]
    at = tl.broadcast_to(at[None, :, :], (COPIES, BLOCK_D, BLOCK_M))
    return at, tl.broadcast_to(real[None, None, :], (COPIES, BLOCK_D, BLOCK_M))


@triton.jit
def read_split(
    query, real, keys, values, table, start, stop, length, window, scale, cap,
    KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    SHARES: tl.constexpr, HALVES: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention over slots `start` to `stop` of a row of `length`, whose line of the page table is `table`.

    Args:
        query: where queries begin, `[M]`, of which some are `real`. keys, values: pages, at this KV head.

    Returns:
        weighted values `[M, V]`, largest score and sum of weights `[M]`, float32.
    """
    # fmt: off
    if AHEAD and HALVES:
        at, real_at = columns(query, real, 2 * SHARES, BLOCK_D, BLOCK_M)
        acc, most, total = attend_halved(
            at, real_at, keys, values, table, start, stop, stop == length, scale, window,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, SHARES, STAGES, OVERLAP,
        )
        acc = tl.trans(acc)
    elif AHEAD:
        at, real_at = columns(query, real, 2 * SHARES, BLOCK_D, BLOCK_M)
        acc, most, total = attend_ahead(
            at, real_at, keys, values, table, start, stop, stop == length, scale, window,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, SHARES, STAGES, OVERLAP,
        )
        acc = tl.trans(acc)
    elif SHARES > 1:
        pages = load_pages(table, start + slots_apart(BLOCK_N, SHARES), stop, PAGE_SIZE)
        COLUMNS: tl.constexpr = 2 * BLOCK_M if HALVES else BLOCK_M
        if HALVES:
            query = tl.reshape(tl.join(query, query), (COLUMNS,))
            real = tl.reshape(tl.join(real, real), (COLUMNS,))
        at, real_at = columns(query, real, SHARES, BLOCK_D, COLUMNS)
        acc, most, total = attend_apart(
            at, real_at, keys, values, table, pages, start, stop, length - window, stop == length, scale, cap,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, COLUMNS, BLOCK_N, SHARES, HALVES, WINDOWED, CAPPED, PRECISION,
            STAGES, OVERLAP,
        )
        acc = tl.trans(acc)
    else:
        await_others(OVERLAP)
        d = tl.arange(0, BLOCK_D)
        tile = tl.load(query[:, None] + d[None, :], mask=real[:, None] & (d < KEY_DIM)[None, :], other=0.0)
        high = tl.full([BLOCK_M], 0, tl.int32) + length
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc, most, total = attend(
            acc, most, total, tile, keys, values, table, start, stop, high - window, high, high, high, scale, cap,
            KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, True, WINDOWED, False, CAPPED,
            PRECISION, STAGES,
        )
        admit_next(OVERLAP)
    # fmt: on
    return acc, most, total


@triton.jit
def merge_ended(
    arrived, parts, stats, order, context, place, members, row, size, count, head, splits, sinks, out,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, SINKS: tl.constexpr, MEMBERS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A split is done for its rows: `row`, of `count` splits of `size`, or the `members` from `place` of `order` on.
    Of a row of which it was the last one all are merged."""
    for member in range(members):
        if MEMBERS > 1:
            row = tl.load(order + place + member)
            count = count_on_card(tl.load(context + row), size)
        flag = arrived + row * KV_HEADS + head
        if tl.atomic_add(flag, 1, sem="acq_rel") == count - 1:
            tl.store(flag, 0)
            # fmt: off
            store_merged(
                parts, stats, row * splits, count, row, head,
                sinks, out, GROUP, KV_HEADS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_P, SINKS, WHOLE,
            )
            # fmt: on


@triton.jit(do_not_specialize=["rows", "width", "splits", "window"])
def decode_kernel(
    query, key_pages, value_pages, table, context, sinks, out, parts, stats, arrived, order, common,
    rows, width, splits, window, scale, cap, stride_token, stride_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    SHARES: tl.constexpr, MEMBERS: tl.constexpr, HALVES: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One split of one row (see `splits.py`) and KV head; the program that ends last merges a row's, in their order.

    With `MEMBERS`, one split of up to so many rows that have it in common, which is read once. With `HALVES` those of a
    split are summed apart (see `halved`). With `AHEAD`, programs are few (see `fetches_ahead`), and `merge.py` merges
    their parts.

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
        # fmt: off
        read, members = members_of(
            order, common, context, place, split, rows, PAGE_SIZE, SPLIT, FULL, BLOCK_N, HALVES, MEMBERS
        )
        # fmt: on
        if read:
            return
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
    start = first + start_on_card(split, size, BLOCK_N, HALVES)
    stop = tl.where(split + 1 == count, length, first + start_on_card(split + 1, size, BLOCK_N, HALVES))
    own_query = query + mine.to(tl.int64) * stride_token
    if AHEAD:
        fetch_queries(own_query + tl.where(real, heads, head * GROUP) * stride_head, KEY_DIM, OVERLAP)
    # fmt: off
    acc, most, total = read_split(
        own_query + heads * stride_head, real, key_pages + head * (PAGE_SIZE * KEY_DIM),
        value_pages + head * (PAGE_SIZE * VALUE_DIM), table + row.to(tl.int64) * width, start, stop, length, window,
        scale, cap, KV_HEADS, PAGE_SIZE, KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, WINDOWED, CAPPED,
        PRECISION, STAGES, SHARES, HALVES, AHEAD, OVERLAP,
    )
    # fmt: on
    HEADS: tl.constexpr = KV_HEADS * GROUP
    line = (mine.to(tl.int64) * splits + split) * HEADS + heads
    if AHEAD:
        store_part(parts, stats, line, acc, most, total, real, VALUE_DIM, BLOCK_V)
    elif count <= 1:
        line = mine.to(tl.int64) * HEADS + heads
        store_result(out, line, acc, most, total, sinks, heads, real, VALUE_DIM, BLOCK_V, SINKS)
    else:
        store_part(parts, stats, line, acc, most, total, real, VALUE_DIM, BLOCK_V)
        WHOLE: tl.constexpr = OVERLAP and key_pages.dtype.element_ty == tl.float8e4nv  # as `merge.py` has it
        # fmt: off
        merge_ended(
            arrived, parts, stats, order, context, place, members, row, size, count, head, splits, sinks, out,
            GROUP, KV_HEADS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_P, SINKS, MEMBERS, WHOLE,
        )
        # fmt: on
