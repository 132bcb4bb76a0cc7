"""`attend_apart` over fp8 where programs are few and begin before the kernels ahead have ended: on Hopper.

Two tiles are taken at a time, so that a warp has scores of one to compute while it waits for those of the other: of two
programs a processor, with two warps each, nothing else hides how long a product takes. What is computed is the same and
in the same order, and so are the sums, to the bit.

What is fetched early is fetched a step at a time. All of it at once, from all programs that have just begun, makes a
queue of some six microseconds, in which the kernels ahead stand as well, with the parts that they store and merge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_paged.kernels.overlap import admit_next, await_others
from hf_paged.kernels.tiles import load_pages, vectors
from hf_paged.kernels.tiles_apart import add_pairs, joined, queries, slots_apart, weighed

# A word at `$2`, page `[$1]` of `$3` bytes, where `$4` is not 0. (As loads of Triton's own, of which one gives the
# address of the other and that the address of a tile, they would keep the loop's loads from running ahead.)
_PROBE = (
    "{ .reg .pred p; .reg .u32 page; .reg .u64 at; setp.ne.u32 p, $4, 0; mov.u32 $0, 0; @p ld.global.u32 page, [$1]; "
    "@p mad.wide.u32 at, page, $3, $2; @p ld.global.u32 $0, [at]; }"
)
PROBE = tl.constexpr(_PROBE)
_FETCH = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
FETCH = tl.constexpr(_FETCH)


@triton.jit
def fetch_queries(at, KEY_DIM: tl.constexpr, OVERLAP: tl.constexpr):
    """Into the L2 cache, where whoever writes to them finds them, heads `at` `[M]`: they may be written yet."""
    if OVERLAP:
        lines = (at[:, None] + tl.arange(0, KEY_DIM // 16)[None, :] * 16).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(FETCH, "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def probed(
    key_pages, table, begin, n, asked, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Four bytes near the end of the key of each slot `begin + n`, where it is `asked` for: there when the key is."""
    zeros = n - n
    line = (table + (begin + n) // PAGE_SIZE).to(tl.int64, bitcast=True)
    at = vectors(key_pages, zeros, begin, n, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N) + (KEY_DIM - 8)
    given = [line, at.to(tl.int64, bitcast=True), zeros + KV_HEADS * PAGE_SIZE * KEY_DIM, asked.to(tl.int32)]
    return tl.inline_asm_elementwise(PROBE, "=r,l,l,r,r", given, dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load_values(
    value_pages, pages, begin, n, stop, PAIRS: tl.constexpr,
    KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Values of slots `begin + n` in pairs, `[SHARES, PAIRS, N]`, 0 from `stop` on; and which lie before it."""
    held = begin + n < stop
    at = vectors(value_pages, pages, begin, n, KV_HEADS, PAGE_SIZE, PAIRS, BLOCK_N)
    pairs = tl.arange(0, PAIRS)[None, :, None]
    return tl.load(at[:, None, :] + pairs, mask=held[:, None, :], other=0), held


@triton.jit
def add_tile(acc, odd, most, total, scores, value, held, scale, OVERLAP: tl.constexpr):
    """A tile's values, weighted by its scores."""
    weights, fade, most, total = weighed(scores, held[:, :, None], most, total, scale)
    acc, odd = add_pairs(acc, odd, value, weights, fade, OVERLAP)
    return acc, odd, most, total


@triton.jit
def attend_ahead(
    query_at, real, key_pages, value_pages, table, start, stop, fresh, scale, zero,
    KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARES: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """What `attend_apart` returns, without a window and caps, over pages in fp8.

    Args:
        query_at: where queries lie, `[2 * SHARES, D, M]`, the same for both tiles, those of `real`.
        zero: 0, which the compiler does not know.
        STAGES: of steps of two tiles.
    """
    STEP: tl.constexpr = 2 * BLOCK_N
    value_pages = value_pages.to(tl.pointer_type(tl.int16))
    n = slots_apart(BLOCK_N, SHARES)
    both = slots_apart(STEP, 2 * SHARES)
    d = tl.arange(0, KEY_DIM)[None, None, :]
    PAIRS: tl.constexpr = VALUE_DIM // 2
    acc = tl.zeros([SHARES, PAIRS, BLOCK_M], tl.float32)
    odd = acc
    most = tl.full([SHARES, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([SHARES, BLOCK_M], tl.float32)
    query = tl.zeros([2 * SHARES, KEY_DIM, BLOCK_M], tl.float16)
    if not OVERLAP:
        query = queries(query_at, real, True)
    elif fresh & (stop - start <= STAGES * STEP):  # as in `attend_apart`
        await_others(OVERLAP)
    next_both = load_pages(table, start + both, stop, PAGE_SIZE)
    next_first = load_pages(table, start + n, stop, PAGE_SIZE)
    next_second = load_pages(table, start + BLOCK_N + n, stop, PAGE_SIZE)
    for begin in tl.range(start, stop, STEP, num_stages=STAGES):
        # Pages of both tiles' keys and of each one's values: a step ahead, as in `attend`.
        of_keys, first, second = next_both, next_first, next_second
        more = begin + STEP
        if OVERLAP:  # the steps that are fetched before the first is taken, each when the one before is there
            asked = (begin > start) & (begin < start + (STAGES - 1) * STEP) & (begin + both < stop)
            word = probed(key_pages, table, begin - STEP, both, asked, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N)
            more += word & zero
        next_both = load_pages(table, more + both, stop, PAGE_SIZE)
        next_first = load_pages(table, begin + STEP + n, stop, PAGE_SIZE)
        next_second = load_pages(table, begin + STEP + BLOCK_N + n, stop, PAGE_SIZE)
        # Splits begin at multiples of BLOCK_N, not of STEP.
        at = vectors(key_pages, of_keys, begin, both, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N)
        key = tl.load(at[:, :, None] + d)
        # fmt: off
        first_value, first_held = load_values(
            value_pages, first, begin, n, stop, PAIRS, KV_HEADS, PAGE_SIZE, BLOCK_N
        )
        second_value, second_held = load_values(
            value_pages, second, begin + BLOCK_N, n, stop, PAIRS, KV_HEADS, PAGE_SIZE, BLOCK_N
        )
        # fmt: on
        if OVERLAP and begin == start:
            await_others(OVERLAP)
            admit_next(OVERLAP)
            query = queries(query_at, real, True)
        scores = tl.reshape(tl.dot(key.to(tl.float16), query), (2, SHARES, BLOCK_N // SHARES, BLOCK_M))
        one, other = tl.split(tl.permute(scores, (1, 2, 3, 0)))
        acc, odd, most, total = add_tile(acc, odd, most, total, one, first_value, first_held, scale, OVERLAP)
        acc, odd, most, total = add_tile(acc, odd, most, total, other, second_value, second_held, scale, OVERLAP)
    acc, most, total = joined(acc, odd, most, total, True, 1, SHARES, BLOCK_M)
    return tl.reshape(acc, (VALUE_DIM, BLOCK_M)), tl.reshape(most, (BLOCK_M,)), tl.reshape(total, (BLOCK_M,))
