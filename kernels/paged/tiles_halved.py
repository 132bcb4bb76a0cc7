"""`attend_apart` over fp8 where programs are few, both halves of a split side by side: on Hopper.

Each half is read by as many warps as read a whole split elsewhere: of two programs a processor, with two warps each,
nothing would hide how long a product takes. What is computed of a half is the same and in the same order, and so are
the sums, to the bit. What is fetched early is fetched a step at a time, see `tiles_ahead.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_paged.kernels.overlap import admit_next, await_others
from hf_paged.kernels.tiles import load_pages, vectors
from hf_paged.kernels.tiles_ahead import add_tile, load_values, probed
from hf_paged.kernels.tiles_apart import half_of, joined, of_both, queries


@triton.jit
def attend_halved(
    query_at, real, key_pages, value_pages, table, start, stop, fresh, scale, zero,
    KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARES: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """What `attend_apart` returns, without a window and caps, over pages in fp8, by twice as many warps.

    Args:
        query_at: where queries lie, `[2 * SHARES, D, M]`, the same for both halves, those of `real`.
        zero: 0, which the compiler does not know.
        STAGES: of tiles of both halves.
    """
    value_pages = value_pages.to(tl.pointer_type(tl.int16))
    PAIRS: tl.constexpr = VALUE_DIM // 2
    BOTH: tl.constexpr = 2 * SHARES
    half = half_of(start, stop, BLOCK_N)
    place = tl.arange(0, BOTH)[:, None]
    n = place % SHARES * (BLOCK_N // SHARES) + tl.arange(0, BLOCK_N // SHARES)[None, :]
    start_of = start + place // SHARES * half  # where each one's half begins
    d = tl.arange(0, KEY_DIM)[None, None, :]
    acc = tl.zeros([BOTH, PAIRS, BLOCK_M], tl.float32)
    odd = acc
    most = tl.full([BOTH, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BOTH, BLOCK_M], tl.float32)
    query = tl.zeros([BOTH, KEY_DIM, BLOCK_M], tl.float16)
    if not OVERLAP:
        query = queries(query_at, real, True)
    elif fresh & (stop - start - half <= STAGES * BLOCK_N):  # as in `attend_apart`: the last slot ends the second half
        await_others(OVERLAP)
    next_pages = load_pages(table, start_of + n, stop, PAGE_SIZE)
    for begin in tl.range(0, half, BLOCK_N, num_stages=STAGES):
        begin_of = start_of + begin
        slots = begin_of + n
        pages = next_pages  # a tile ahead, as in `attend`
        more = slots + BLOCK_N
        if OVERLAP:  # the tiles that are fetched before the first is taken, each when the one before is there
            asked = (begin > 0) & (begin < (STAGES - 1) * BLOCK_N) & (slots < stop)
            word = probed(key_pages, table, begin_of - BLOCK_N, n, asked, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N)
            more += word & zero
        next_pages = load_pages(table, more, stop, PAGE_SIZE)
        key = tl.load(vectors(key_pages, pages, begin_of, n, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N)[:, :, None] + d)
        value, held = load_values(value_pages, pages, begin_of, n, stop, PAIRS, KV_HEADS, PAGE_SIZE, BLOCK_N)
        if OVERLAP and begin == 0:
            await_others(OVERLAP)
            admit_next(OVERLAP)
            query = queries(query_at, real, True)
        scores = tl.dot(key.to(tl.float16), query)
        acc, odd, most, total = add_tile(acc, odd, most, total, scores, value, held, scale, OVERLAP)
    acc, most, total = joined(acc, odd, most, total, True, 2, SHARES, BLOCK_M)
    return of_both(tl.permute(acc, (1, 2, 0)), tl.permute(most, (1, 0)), tl.permute(total, (1, 0)))
