"""Parts of a query's attention, one a split, merged by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, padded, power_of_two
from hf_paged.kernels.tiles import normalised

TILE = 8192  # numbers of parts that are merged at once


@triton.jit
def store_part(parts, stats, line, acc, most, total, real, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """Weighted values `[M, V]`, largest scores and sums of weights `[M]`, to lines `[M]` of parts, the `real` ones.

    All of it is written when this returns, so that it may be said to be there.
    """
    v = tl.arange(0, BLOCK_V)
    tl.store(parts + line[:, None] * VALUE_DIM + v[None, :], acc, mask=real[:, None] & (v < VALUE_DIM)[None, :])
    tl.store(stats + line * 2, most, mask=real)
    tl.store(stats + line * 2 + 1, total, mask=real)
    tl.debug_barrier()


@triton.jit
def store_result(
    out, line, acc, most, total, sinks, heads, real,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attention `[M, V]` of query heads `[M]`, to lines `[M]` of `out`, those that are `real`."""
    v = tl.arange(0, BLOCK_V)
    sink = most
    if SINKS:
        sink = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
    done = normalised(acc, most, total, sink, SINKS).to(out.dtype.element_ty)
    tl.store(out + line[:, None] * VALUE_DIM + v[None, :], done, mask=real[:, None] & (v < VALUE_DIM)[None, :])


@triton.jit
def folded(acc, most, total, values, peaks, sums, WHOLE: tl.constexpr):
    """What was merged before and parts `[G, P, V]`, with their largest scores and sums of weights `[G, P]`.

    With `WHOLE`, weights are summed as whole numbers: so the sum is the same however threads share it. (They are some
    thousands at most, and 1 at least where the largest score is.)
    """
    peak = tl.maximum(most, tl.max(peaks, 1))
    around = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(peaks - around[:, None])
    fade = tl.exp2(most - around)
    added = sums * weights
    if WHOLE:
        added = tl.where(added == added, added, 0.0) * 68719476736.0  # 2^36; where it is NaN, so are the values
        total = total * fade + tl.sum(added.to(tl.int64), 1).to(tl.float32) * (1.0 / 68719476736.0)
    else:
        total = total * fade + tl.sum(added, 1)
    acc = acc * fade[:, None] + tl.sum(values * weights[:, :, None], 1)
    return acc, peak, total


@triton.jit
def merged(
    parts, stats, first, count, heads, real,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Lines `first`, `first + 1`, ... (`count` of them) of `heads` `[BLOCK_G]`, those that are `real`.

    Returns:
        weighted values `[BLOCK_G, BLOCK_V]`, largest score and sum of weights `[BLOCK_G]`.
    """
    v = tl.arange(0, BLOCK_V)
    p = tl.arange(0, BLOCK_P)
    parts += first.to(tl.int64) * (HEADS * VALUE_DIM)
    stats += first.to(tl.int64) * (HEADS * 2)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for begin in range(0, count, BLOCK_P):
        # Heads first: so each thread has all lines of its elements, and need not wait for others to sum them.
        line = heads[:, None] + (begin + p)[None, :] * HEADS
        there = real[:, None] & (begin + p < count)[None, :]
        at = parts + (line[:, :, None] * VALUE_DIM + v[None, None, :])
        values = tl.load(at, mask=there[:, :, None] & (v < VALUE_DIM)[None, None, :], other=0.0)
        peaks = tl.load(stats + line * 2, mask=there, other=float("-inf"))
        sums = tl.load(stats + line * 2 + 1, mask=there, other=0.0)
        acc, most, total = folded(acc, most, total, values, peaks, sums, WHOLE)
    return acc, most, total


@triton.jit
def store_merged(
    parts, stats, first, count, token, head, sinks, out,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, SINKS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Attention of the query at `token` of `out`, for KV head `head`, from its parts (see `merged`)."""
    g = tl.arange(0, BLOCK_G)
    heads = head * GROUP + g
    real = g < GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    # fmt: off
    acc, most, total = merged(
        parts, stats, first, count, heads, real, HEADS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_P, WHOLE
    )
    # fmt: on
    line = token.to(tl.int64) * HEADS + heads
    store_result(out, line, acc, most, total, sinks, heads, real, VALUE_DIM, BLOCK_V, SINKS)


def merge_constants(shape: HeadShape) -> dict:
    """Sizes of what `merged` takes at once."""
    group = power_of_two(shape.group)
    return {"BLOCK_G": group, "BLOCK_P": max(1, min(32, TILE // (group * padded(shape.value_dim))))}


def part_buffers(lines: int, heads: int, value_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of `lines` queries: float32 `[lines, heads, value_dim]` and `[lines, heads, 2]`."""
    parts = torch.empty(lines, heads, value_dim, dtype=torch.float32, device=device)
    return parts, torch.empty(lines, heads, 2, dtype=torch.float32, device=device)
