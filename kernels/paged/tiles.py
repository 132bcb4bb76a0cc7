"""What the Triton attention kernels share: online softmax over tiles of paged keys and values.

Scores are kept in units of log2 (the scale holds log2(e)), sums and weighted values in float32: Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pages(table, slots, end, PAGE_SIZE: tl.constexpr):
    """Page of each slot; past `end`, page 0: what stands behind a row's last page may be anything.

    Also where a tile lies on one page: a single number would not be loaded ahead of the tile (1.5 times slower).
    """
    return tl.load(table + slots // PAGE_SIZE, mask=slots < end, other=0)


@triton.jit
def slot_offsets(pages, slots, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr):
    """Where the slots' vectors begin in a layer `[num_pages, kv_heads, page_size, dim]`, for head 0."""
    return pages.to(tl.int64) * (KV_HEADS * PAGE_SIZE * DIM) + (slots % PAGE_SIZE) * DIM


@triton.jit
def softcapped(scores, cap):
    """`cap * tanh(scores / cap)` in units of log2."""
    return (cap * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.8853900817779268 / cap))))


@triton.jit
def visible_slots(slots, low, high, base, visible, WINDOWED: tl.constexpr, TREE: tl.constexpr):
    """Bool `[BLOCK_M, BLOCK_N]`: `low <= slot < high`, and of the 63 slots from `base` on what the bits say."""
    seen = slots[None, :] < high[:, None]
    if WINDOWED:
        seen = seen & (slots[None, :] >= low[:, None])
    if TREE:
        beyond = slots[None, :] - base[:, None]
        bit = (visible[:, None] >> tl.minimum(tl.maximum(beyond, 0), 63).to(tl.int64)) & 1
        seen = seen & ((beyond < 0) | (bit != 0))
    return seen


@triton.jit
def attend(
    acc,
    most,
    total,
    query,
    key_pages,
    value_pages,
    table,
    start,
    stop,
    low,
    high,
    base,
    visible,
    scale,
    cap,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    TREE: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take slots `start` (a multiple of `BLOCK_N`) to `stop` into a running softmax.

    Args:
        acc, most, total: weighted values `[M, V]`, largest score and sum of weights `[M]`, float32.
        query: `[M, D]`. table: the row's line of the page table. key_pages, value_pages: at this KV head.
        low, high, base, visible: what each query sees (`visible_slots`), looked at if `MASKED`; without it all queries
            see all slots, and `stop` is a multiple of `BLOCK_N`.
        scale: over 0; with log2(e) in it, unless `CAPPED`.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    next_pages = load_pages(table, start + n, stop, PAGE_SIZE)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        slots = begin + n
        pages = next_pages  # one tile ahead: keys need not wait for them
        next_pages = load_pages(table, slots + BLOCK_N, stop, PAGE_SIZE)
        at_key = key_pages + slot_offsets(pages, slots, KV_HEADS, PAGE_SIZE, KEY_DIM)
        at_value = value_pages + slot_offsets(pages, slots, KV_HEADS, PAGE_SIZE, VALUE_DIM)
        key_at, value_at = at_key[None, :] + d[:, None], at_value[:, None] + v[None, :]
        # What is not loaded is 0: a weight of 0 times NaN would be NaN.
        if MASKED:
            held = slots < stop
            if WINDOWED:  # slots before every query's window may be anything as well
                held = held & (slots >= tl.min(low, 0))
            key = tl.load(key_at, mask=held[None, :] & (d < KEY_DIM)[:, None], other=0.0)
            value = tl.load(value_at, mask=held[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
        else:
            key = tl.load(key_at, mask=(d < KEY_DIM)[:, None], other=0.0)
            value = tl.load(value_at, mask=(v < VALUE_DIM)[None, :], other=0.0)
        scores = tl.dot(query, key.to(query.dtype), input_precision=PRECISION)
        factor = scale  # taken in where scores are used: a product and a difference are one instruction
        if CAPPED:
            scores = softcapped(scores * scale, cap)
            factor = 1.0
        if MASKED:
            scores = tl.where(visible_slots(slots, low, high, base, visible, WINDOWED, TREE), scores, float("-inf"))
        peak = tl.maximum(most, tl.max(scores, 1) * factor)
        around = peak
        if MASKED:  # a query that has seen nothing yet
            around = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(scores * factor - around[:, None])
        fade = tl.exp2(most - around)
        total = total * fade + tl.sum(weights, 1)
        value = value.to(query.dtype)
        acc = tl.dot(weights.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
        most = peak
    return acc, most, total


@triton.jit
def widened(x):
    """The lower byte of each word, in e4m3, as float16, which holds them all."""
    return x.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def attend_apart(
    query,
    key_pages,
    value_pages,
    table,
    start,
    stop,
    low,
    scale,
    cap,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SHARES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `attend` from nothing, with a tile's slots dealt out to `SHARES` warps, each with a softmax of its own.

    Products over a first axis of as many as there are warps give each warp one of them. So warps exchange neither
    maxima nor weights within a tile, which for one query takes longer than its arithmetic; they are merged once, at
    the end. Keys and values stand on the left: there a product has 16 lines at least, on the right 8, and queries are
    few.

    Pages in fp8 are computed with in float16. Values are turned on their way from shared memory, which can be done with
    two bytes, not with one: they come in pairs of elements, and each half has sums of its own.

    Args:
        query: `[D, M]`; all columns see the slots up to `stop`, from `low` on (looked at if `WINDOWED`).

    Returns:
        weighted values `[V, M]`, largest score and sum of weights `[M]`, float32.
    """
    SHARE: tl.constexpr = BLOCK_N // SHARES
    NARROW: tl.constexpr = (key_pages.dtype.element_ty == tl.float8e4nv) & (query.dtype != tl.float32)
    PAIR: tl.constexpr = 2 if NARROW else 1
    if NARROW:
        query = query.to(tl.float32)
        query = tl.where(query > 65504.0, 65504.0, tl.where(query < -65504.0, -65504.0, query)).to(tl.float16)
        value_pages = value_pages.to(tl.pointer_type(tl.int16))
    n = tl.arange(0, SHARES)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    v = tl.arange(0, BLOCK_V // PAIR)[None, :, None]
    query = tl.broadcast_to(query[None, :, :], (SHARES, BLOCK_D, BLOCK_M))
    acc = tl.zeros([SHARES, BLOCK_V // PAIR, BLOCK_M], tl.float32)
    odd = acc
    most = tl.full([SHARES, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([SHARES, BLOCK_M], tl.float32)
    next_pages = load_pages(table, start + n, stop, PAGE_SIZE)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        slots = begin + n
        pages = next_pages  # one tile ahead, as in `attend`
        next_pages = load_pages(table, slots + BLOCK_N, stop, PAGE_SIZE)
        at_key = key_pages + slot_offsets(pages, slots, KV_HEADS, PAGE_SIZE, KEY_DIM)[:, :, None]
        at_value = value_pages + slot_offsets(pages, slots, KV_HEADS, PAGE_SIZE, VALUE_DIM // PAIR)[:, None, :]
        held = slots < stop
        if WINDOWED:
            held = held & (slots >= low)
        key = tl.load(at_key + d, mask=held[:, :, None] & (d < KEY_DIM), other=0.0)
        value = tl.load(at_value + v, mask=held[:, None, :] & (v < VALUE_DIM // PAIR), other=0.0)
        scores = tl.dot(key.to(query.dtype), query, input_precision=PRECISION)
        factor = scale
        if CAPPED:
            scores = softcapped(scores * scale, cap)
            factor = 1.0
        scores = tl.where(held[:, :, None], scores, float("-inf"))
        peak = tl.maximum(most, tl.max(scores, 1) * factor)
        around = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(scores * factor - around[:, None, :])
        fade = tl.exp2(most - around)
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(query.dtype)
        if NARROW:
            acc = tl.dot(widened(value), weights, acc * fade[:, None, :])
            odd = tl.dot(widened(value >> 8), weights, odd * fade[:, None, :])
        else:
            acc = tl.dot(value.to(query.dtype), weights, acc * fade[:, None, :], input_precision=PRECISION)
        most = peak
    peak = tl.max(most, 0)
    around = tl.where(peak == float("-inf"), 0.0, peak)
    fade = tl.exp2(most - around[None, :])
    acc = tl.sum(acc * fade[:, None, :], 0)
    if NARROW:
        both = tl.join(acc, tl.sum(odd * fade[:, None, :], 0))
        acc = tl.reshape(tl.permute(both, (0, 2, 1)), (BLOCK_V, BLOCK_M))
    return acc, peak, tl.sum(total * fade, 0)


@triton.jit
def normalised(acc, most, total, sink, SINKS: tl.constexpr):
    """Weighted values over the sum of weights, a sink's among them; zeros where nothing was seen.

    `sink` `[M]` is in units of log2 (anything without `SINKS`).
    """
    if SINKS:
        peak = tl.maximum(most, sink)
        around = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp2(most - around)
        total = total * fade + tl.exp2(sink - around)
        acc = acc * fade[:, None]
    return acc / tl.where(total > 0, total, 1.0)[:, None]
