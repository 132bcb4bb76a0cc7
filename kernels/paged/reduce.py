"""Parts of a query's attention, one a split, merged by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, padded, power_of_two
from hf_paged.kernels.tiles import normalised

TILE = 8192  # numbers of parts that are merged at once


@triton.jit
def merged(
    parts, stats, first, step, count, heads, real,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Lines `first`, `first + step`, ... (`count` of them) of `heads` `[BLOCK_G]`, those that are `real`.

    Returns:
        weighted values `[BLOCK_G, BLOCK_V]`, largest score and sum of weights `[BLOCK_G]`.
    """
    v = tl.arange(0, BLOCK_V)
    p = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for begin in range(0, count, BLOCK_P):
        line = (first + (begin + p) * step).to(tl.int64)[:, None] * HEADS + heads[None, :]
        there = (begin + p < count)[:, None] & real[None, :]
        at = parts + line[:, :, None] * VALUE_DIM + v[None, None, :]
        values = tl.load(at, mask=there[:, :, None] & (v < VALUE_DIM)[None, None, :], other=0.0)
        peaks = tl.load(stats + line * 2, mask=there, other=float("-inf"))
        sums = tl.load(stats + line * 2 + 1, mask=there, other=0.0)
        peak = tl.maximum(most, tl.max(peaks, 0))
        around = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(peaks - around[None, :])
        fade = tl.exp2(most - around)
        total = total * fade + tl.sum(sums * weights, 0)
        acc = acc * fade[:, None] + tl.sum(values * weights[:, :, None], 0)
        most = peak
    return acc, most, total


@triton.jit
def store_merged(
    parts, stats, first, step, count, token, head, sinks, out,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attention of the query at `token` of `out`, for KV head `head`, from its parts (see `merged`)."""
    g = tl.arange(0, BLOCK_G)
    v = tl.arange(0, BLOCK_V)
    heads = head * GROUP + g
    real = g < GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    # fmt: off
    acc, most, total = merged(
        parts, stats, first, step, count, heads, real, HEADS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_P
    )
    # fmt: on
    sink = most
    if SINKS:
        sink = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
    done = normalised(acc, most, total, sink, SINKS)
    at = out + (token.to(tl.int64) * HEADS + heads)[:, None] * VALUE_DIM + v[None, :]
    tl.store(at, done.to(out.dtype.element_ty), mask=real[:, None] & (v < VALUE_DIM)[None, :])


def merge_constants(shape: HeadShape) -> dict:
    """Sizes of what `merged` takes at once."""
    group = power_of_two(shape.group)
    return {"BLOCK_G": group, "BLOCK_P": max(1, min(32, TILE // (group * padded(shape.value_dim))))}
