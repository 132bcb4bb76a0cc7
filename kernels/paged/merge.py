"""Parts of a decode merged by a kernel of its own, a program of one warp a row and query head.

Where few programs decode, the last of them would merge for all query heads of a KV head while its processor is waited
for. This kernel starts beside them, and lets the next one start at once, which may fetch ahead meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, TileConfig, padded
from hf_paged.kernels.overlap import admit_next, await_others, overlap
from hf_paged.kernels.reduce import folded, merge_constants, store_result
from hf_paged.kernels.splits import count_on_card, size_on_card


@triton.jit
def merged_by_twos(
    parts, stats, count,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """As `merged`, for one head: the same sums in the same order, of twice as many lines that are loaded at once.

    `parts`, `stats`: at its first line.
    """
    v = tl.arange(0, BLOCK_V)
    p = tl.arange(0, 2 * BLOCK_P)
    acc = tl.zeros([1, BLOCK_V], tl.float32)
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for begin in range(0, count, 2 * BLOCK_P):
        # At known distances from one address: so the loads follow each other at once.
        there = (p < count - begin)[None, :]
        at = (parts + v)[None, None, :] + p[None, :, None] * (HEADS * VALUE_DIM)
        values = tl.load(at, mask=there[:, :, None] & (v < VALUE_DIM)[None, None, :], other=0.0)
        at = stats + p[None, :] * (HEADS * 2)
        peaks = tl.load(at, mask=there, other=float("-inf"))
        sums = tl.load(at + 1, mask=there, other=0.0)
        values, more = tl.split(tl.permute(tl.reshape(values, (1, 2, BLOCK_P, BLOCK_V)), (0, 2, 3, 1)))
        peaks, more_peaks = tl.split(tl.permute(tl.reshape(peaks, (1, 2, BLOCK_P)), (0, 2, 1)))
        sums, more_sums = tl.split(tl.permute(tl.reshape(sums, (1, 2, BLOCK_P)), (0, 2, 1)))
        acc, most, total = folded(acc, most, total, values, peaks, sums, WHOLE)
        acc, most, total = folded(acc, most, total, more, more_peaks, more_sums, WHOLE)
        parts += 2 * BLOCK_P * HEADS * VALUE_DIM
        stats += 2 * BLOCK_P * HEADS * 2
    return acc, most, total


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    context, sinks, out, parts, stats, splits,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, SINKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`parts`, `stats`: as `decode_kernel` leaves them, with a part also of rows that have one split."""
    admit_next(OVERLAP)
    pid = tl.program_id(0)
    row = pid // HEADS
    head = pid % HEADS
    length = tl.load(context + row)
    count = count_on_card(length, size_on_card(length, SPLIT, FULL, BLOCK_N))
    await_others(OVERLAP)
    first = row.to(tl.int64) * splits * HEADS + head
    acc, most, total = merged_by_twos(
        parts + first * VALUE_DIM, stats + first * 2, count, HEADS, VALUE_DIM, BLOCK_V, BLOCK_P, OVERLAP
    )
    heads = head + tl.arange(0, 1)
    line = row.to(tl.int64) * HEADS + heads
    store_result(out, line, acc, most, total, sinks, heads, heads < HEADS, VALUE_DIM, BLOCK_V, SINKS)


def merge_parts(
    context: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    parts: torch.Tensor,
    stats: torch.Tensor,
    constants: dict,
) -> None:
    """The parts of `decode_kernel`, `[rows * splits, heads, ...]`, into `out`. `constants`: see `merging_constants`."""
    rows, heads, _ = out.shape
    given = context, out if sinks is None else sinks, out, parts, stats, len(parts) // rows
    merge_kernel[(rows * heads,)](*given, **constants, **overlap(out.device), num_warps=1)


def merging_constants(shape: HeadShape, config: TileConfig, full: int, sinks: bool) -> dict:
    """What `merge_kernel` is compiled for. `full`: as `decode_kernel` has it."""
    return {
        "HEADS": shape.group * shape.kv_heads,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_V": padded(shape.value_dim),
        "BLOCK_P": merge_constants(shape)["BLOCK_P"],
        "BLOCK_N": config.block_n,
        "SPLIT": config.split,
        "FULL": full,
        "SINKS": sinks,
    }
