"""What the Triton attention kernels share: online softmax over tiles of paged keys and values.

Scores are kept in units of log2 (the scale holds log2(e)), sums and weighted values in float32: Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def load_pages(table, slots, end, PAGE_SIZE: tl.constexpr):
    """Page of each slot; past `end`, page 0: what stands behind a row's last page may be anything.

    Also where a tile lies on one page: a single number would not be loaded ahead of the tile (1.5 times slower).
    """
    return tl.load(table + slots // PAGE_SIZE, mask=slots < end, other=0)


@triton.jit
def vectors(
    layer, pages, begin, n, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Where the vectors of slots `begin + n` begin in a layer `[num_pages, kv_heads, page_size, dim]`, at its head.

    `begin` is a multiple of `BLOCK_N`: where a tile holds whole pages, a slot's place in its page is the same in every
    tile. (A loop spends more instructions on addresses than on arithmetic; a row alone is as fast as its instructions.)
    """
    place = n % PAGE_SIZE
    if PAGE_SIZE > BLOCK_N:
        place = (begin + n) % PAGE_SIZE
    return layer + pages.to(tl.int64) * (KV_HEADS * PAGE_SIZE * DIM) + place * DIM


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
        key_at = vectors(key_pages, pages, begin, n, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N)[None, :] + d[:, None]
        value_at = vectors(value_pages, pages, begin, n, KV_HEADS, PAGE_SIZE, VALUE_DIM, BLOCK_N)[:, None] + v[None, :]
        key_there = (d < KEY_DIM)[:, None]
        value_there = (v < VALUE_DIM)[None, :]
        # What is not loaded is 0: a weight of 0 times NaN would be NaN.
        if MASKED:
            held = slots < stop
            if WINDOWED:  # slots before every query's window may be anything as well, their pages too
                held = held & (slots >= tl.min(low, 0))
                key_there = key_there & held[None, :]
            value_there = value_there & held[:, None]
        key = tl.load(key_at, mask=key_there, other=0.0)
        value = tl.load(value_at, mask=value_there, other=0.0)
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


def scaling(scale: float, softcap: float | None) -> tuple[float, float]:
    """`scale` and `cap` as the attention kernels take them: with log2(e) in the scale, unless scores are capped."""
    return (scale * LOG2E, 0.0) if softcap is None else (scale, softcap)
