"""Parts of a query's attention, one a split, merged by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, TileConfig, padded
from hf_paged.kernels.tiles import normalised


@triton.jit(do_not_specialize=["splits", "window"])
def reduce_kernel(
    parts,
    stats,
    lines,
    sinks,
    out,
    splits,
    window,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    DECODE: tl.constexpr,
):
    """One query and head: `parts` float32 `[lines, heads, value_dim]`, `stats` `[lines, heads, 2]`: peak and sum.

    Where `DECODE`, `lines` is the context of each row, whose parts are lines `row * splits` and on. Else it is int32
    `[queries, 4]`: place of the query in `out`, its first line, how far apart its lines are, how many they are.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    item = pid // HEADS
    if DECODE:
        length = tl.load(lines + item)
        if WINDOWED:
            length = length - tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
        count = tl.cdiv(length, SPLIT)
        token = item
        first = item * splits
        step = 1
        if count <= 1:
            return
    else:
        token = tl.load(lines + item * 4)
        first = tl.load(lines + item * 4 + 1)
        step = tl.load(lines + item * 4 + 2)
        count = tl.load(lines + item * 4 + 3)
    v = tl.arange(0, BLOCK_V)
    p = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_V], tl.float32)
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for begin in range(0, count, BLOCK_P):
        there = begin + p < count
        line = (first + (begin + p) * step).to(tl.int64) * HEADS + head
        peaks = tl.load(stats + line * 2, mask=there, other=float("-inf"))
        sums = tl.load(stats + line * 2 + 1, mask=there, other=0.0)
        at = parts + line[:, None] * VALUE_DIM + v[None, :]
        values = tl.load(at, mask=there[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
        peak = tl.maximum(most, tl.max(peaks, 0))
        around = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(peaks - around)
        fade = tl.exp2(most - around)
        total = total * fade + tl.sum(sums * weights, 0)
        acc = acc * fade + tl.sum(values * weights[:, None], 0)
        most = peak
    sink = most
    if SINKS:
        sink = tl.zeros([1], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
    done = normalised(acc[None, :], most, total, sink, SINKS)
    at = out + (token.to(tl.int64) * HEADS + head) * VALUE_DIM + v
    tl.store(at[None, :], done.to(out.dtype.element_ty), mask=(v < VALUE_DIM)[None, :])


def reduce_constants(shape: HeadShape, config: TileConfig, *, decode: bool, windowed: bool, sinks: bool) -> dict:
    """What `reduce_kernel` is compiled for."""
    return {
        "HEADS": shape.group * shape.kv_heads,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_V": padded(shape.value_dim),
        "BLOCK_N": config.block_n,
        "BLOCK_P": 32,
        "SPLIT": config.split,
        "WINDOWED": windowed and decode,
        "SINKS": sinks,
        "DECODE": decode,
    }
