"""What the groups of warps of `prefill.py` do, block by block, in Gluon."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HALF = gl.constexpr(64)  # lines of a group of warps: those of one instruction
FETCHERS = gl.constexpr(128)  # threads that fetch
# Names that differ between Triton's versions: a barrier of a group's warps, and a load into shared memory.
sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)


@gluon.constexpr_function
def in_rows(dim):
    """Layout of a tile `[*, dim]` of two bytes an element: 16 bytes a thread, row by row."""
    lanes = dim // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def of_products(columns):
    """Layout of a group's products `[64, columns]`."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def fetch(
    pages_of, buffers,
    KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of the slots `start` to `stop`, block by block, each as soon as there is room for it.

    `pages_of`: pages of keys and of values at this KV head, the row's line of the page table, `start`, `stop`, `least`.
    What lies before `least` or behind `stop` is not read and becomes 0: a weight of 0 times NaN would be NaN.
    """
    key_pages, value_pages, line, start, stop, least = pages_of
    _, keys, values, ready, free = buffers
    layout: gl.constexpr = in_rows(DIM)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    d = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    for block in range(gl.cdiv(stop - start, BLOCK_N)):
        slots = start + block * BLOCK_N + n
        held = (slots < stop) & (slots >= least)
        pages = gl.load(line + slots // PAGE_SIZE, mask=held, other=0)
        at = pages.to(gl.int64) * (KV_HEADS * PAGE_SIZE * DIM) + (slots % PAGE_SIZE) * DIM
        stage = block % STAGES
        lap = (block // STAGES) & 1
        mbarrier.wait(free.index(stage), lap ^ 1)
        load(keys.index(stage), key_pages + at[:, None] + d[None, :], mask=held[:, None])
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
        mbarrier.wait(free.index(STAGES + stage), lap ^ 1)
        load(values.index(stage), value_pages + at[:, None] + d[None, :], mask=held[:, None])
        async_copy.mbarrier_arrive(ready.index(STAGES + stage), increment_count=False)


@gluon.jit
def weigh(
    scores, most, total, first_slot, low, high, scale, cap,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Weights of a block's scores, how much what was summed before fades, and the running maximum and sum."""
    layout: gl.constexpr = of_products(BLOCK_N)
    factor = scale
    if CAPPED:
        scores = (cap * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + gl.exp2(scores * scale * (2.8853900817779268 / cap))))
        factor = 1.0
    if MASKED:
        slots = (first_slot + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout)))[None, :]
        seen = slots < high[:, None]
        if WINDOWED:
            seen = seen & (slots >= low[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    peak = gl.maximum(most, gl.max(scores, 1) * factor)
    around = peak
    if MASKED:  # a query that has seen nothing yet
        around = gl.where(peak == float("-inf"), 0.0, peak)
    weights = gl.exp2(scores * factor - around[:, None])
    fade = gl.exp2(most - around)
    return weights, fade, peak, total * fade + gl.sum(weights, 1)


@gluon.jit
def release(free, place):
    """A block has been read: there is room for another."""
    sync()
    mbarrier.arrive(free.index(place), count=1)


@gluon.jit
def follow(
    block, buffers, queries, weights, acc, most, total, start, low, high, scale, cap,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Scores of a block, and meanwhile the weighted values of the block before it."""
    _, keys, values, ready, free = buffers
    s_layout: gl.constexpr = of_products(BLOCK_N)
    o_layout: gl.constexpr = of_products(DIM)
    stage = block % STAGES
    before = (block - 1) % STAGES
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, s_layout)
    mbarrier.wait(ready.index(stage), (block // STAGES) & 1)
    fence_async_shared()
    scores = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(ready.index(STAGES + before), ((block - 1) // STAGES) & 1)
    fence_async_shared()
    sums = warpgroup_mma(weights, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    release(free, stage)
    first_slot = start + block * BLOCK_N
    next_weights, fade, most, total = weigh(
        scores, most, total, first_slot, low, high, scale, cap, BLOCK_N, MASKED, WINDOWED, CAPPED
    )
    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
    release(free, STAGES + before)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
    weights = gl.convert_layout(next_weights.to(queries.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return weights, acc, most, total


@gluon.jit
def merged(parts, stats, first, count, pieces, place, heads, d, HEADS: gl.constexpr, DIM: gl.constexpr):
    """All parts of the lines: weighted values, largest score and sum of weights, as `extend_kernel` has them."""
    layout: gl.constexpr = of_products(DIM)
    acc = gl.zeros([HALF, DIM], gl.float32, layout)
    most = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, layout))
    real = place < count
    for piece in range(pieces):
        line = (first + piece * count + place).to(gl.int64) * HEADS + heads
        values = gl.load(parts + line[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0)
        peak_of = gl.load(stats + line * 2, mask=real, other=float("-inf"))
        peak = gl.maximum(most, peak_of)
        around = gl.where(peak == float("-inf"), 0.0, peak)
        weight = gl.exp2(peak_of - around)
        fade = gl.exp2(most - around)
        total = total * fade + gl.load(stats + line * 2 + 1, mask=real, other=0.0) * weight
        acc = acc * fade[:, None] + values * weight[:, None]
        most = peak
    return acc, most, total


@gluon.jit
def finish(
    acc, most, total, results, item, head,
    WHICH: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Store a half's attention; where it is a part of what its lines see, only when it is the last to end."""
    sinks, out, parts, stats, arrived = results
    layout: gl.constexpr = of_products(DIM)
    HEADS: gl.constexpr = KV_HEADS * GROUP
    token = gl.load(item + 1)
    count = gl.load(item + 2)
    part = gl.load(item + 8)
    m = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    d = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    place = m // GROUP
    real = place < count
    heads = head * GROUP + m % GROUP
    last = part < 0
    if part >= 0:
        pieces = gl.load(item + 10)
        line = (part + place).to(gl.int64) * HEADS + heads
        gl.store(parts + line[:, None] * DIM + d[None, :], acc, mask=real[:, None])
        gl.store(stats + line * 2, most, mask=real)
        gl.store(stats + line * 2 + 1, total, mask=real)
        sync()  # all of the part is written before it is said to be there
        flag = arrived + (gl.load(item + 11) * KV_HEADS + head) * 2 + WHICH
        last = gl.atomic_add(flag, 1, sem="acq_rel") == pieces - 1
        if last:
            gl.store(flag, 0)
            acc, most, total = merged(parts, stats, gl.load(item + 9), count, pieces, place, heads, d, HEADS, DIM)
    if last:
        if SINKS:
            sink = gl.load(sinks + heads).to(gl.float32) * 1.4426950408889634
            peak = gl.maximum(most, sink)
            fade = gl.exp2(most - peak)
            total = total * fade + gl.exp2(sink - peak)
            acc = acc * fade[:, None]
        acc = acc / gl.where(total > 0, total, 1.0)[:, None]
        to = ((token + place).to(gl.int64) * HEADS + heads) * DIM
        gl.store(out + to[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])
