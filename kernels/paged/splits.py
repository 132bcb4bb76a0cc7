"""Splits of a row's slots, as `decode` makes them, and which rows have one in common. Host and kernels say the same.

Splits are of a size that hardly depends on a row's length, and begin where it says: rows of like length that share
their first pages share splits, and one program reads such a split for several of them (Juravsky et al., "Hydragen",
2024; Ye et al., "ChunkAttention", ACL 2024). What a split gives a row depends on that row alone, whoever computes it.
"""

from __future__ import annotations

import triton
import triton.language as tl


def split_size(slots: int, split: int, full: int, block: int) -> int:
    """Slots of a split, a multiple of `block`, for a row of `slots`.

    Args:
        split: slots of the smallest. Where there would be more than `full`, which occupy the card, they grow by
            quarters of it, to twice as many.
    """
    quarters = min(max((slots - 1) // max(full * split // 4, 1) - 3, 0), 4)
    return -(-split * (4 + quarters) // (4 * block)) * block


def split_count(slots: int, size: int) -> int:
    """Splits of a row: all of `size` but for the last one, which has over half of that, and up to half more."""
    return max((slots + size // 2 - 1) // size, 1)


def most_splits(slots: int, split: int, full: int, block: int) -> int:
    """Of any row of up to so many slots."""
    own = split_count(slots, split_size(slots, split, full, block))
    return own if slots <= full * split else max(own, full)


@triton.jit
def size_on_card(slots, SPLIT: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr):
    """`split_size`."""
    STEP: tl.constexpr = FULL * SPLIT // 4 if FULL * SPLIT >= 4 else 1
    quarters = tl.minimum(tl.maximum((slots - 1) // STEP - 3, 0), 4)
    return tl.cdiv(SPLIT * (4 + quarters), 4 * BLOCK_N) * BLOCK_N


@triton.jit
def count_on_card(slots, size):
    """`split_count`."""
    return tl.maximum((slots + size // 2 - 1) // size, 1)


@triton.jit
def start_on_card(split, size, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Where a split begins: at a multiple of `size`. With `HALVES` (see `halved`) every second one begins an eighth of
    that later: programs that began together do not end together then, and leave memory idle."""
    begin = split * size
    if HALVES:
        begin += split % 2 * (size // (8 * BLOCK_N) * BLOCK_N)
    return begin


@triton.jit
def follows(
    order, common, context, place, split, rows,
    PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Whether the rows at these places of `order` have split `split`, whole, in common with those before them."""
    there = (place > 0) & (place < rows)
    own = tl.load(context + tl.load(order + place, mask=there, other=0), mask=there, other=0)
    other = tl.load(context + tl.load(order + place - 1, mask=there, other=0), mask=there, other=0)
    size = size_on_card(own, SPLIT, FULL, BLOCK_N)
    alike = size == size_on_card(other, SPLIT, FULL, BLOCK_N)
    end = split + 1  # the last split is a row's own
    inside = (end < count_on_card(own, size)) & (end < count_on_card(other, size))
    shared = tl.load(common + place, mask=there, other=0) * PAGE_SIZE
    return there & alike & inside & (shared >= start_on_card(end, size, BLOCK_N, HALVES))
