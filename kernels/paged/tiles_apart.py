"""One query's attention over a row's slots, by warps that have a softmax each: what `decode` spends its time in."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_paged.kernels.overlap import admit_next, await_others
from hf_paged.kernels.tiles import load_pages, softcapped, vectors

# Two words of which each gives a byte, gathered by one instruction.
_GATHERED = "{{ .reg .b32 t; .reg .b16 l, h; prmt.b32 t, $1, 0, {}; mov.b32 {{l, h}}, t; cvt.rn.f16x2.e4m3x2 $0, l; }}"
LOWER, UPPER = (tl.constexpr(_GATHERED.format(bytes)) for bytes in ("0x4420", "0x4431"))


@triton.jit
def widened(x, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The lower byte of each word, or the `HIGH` one, in e4m3, as float16, which holds them all."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(UPPER if HIGH else LOWER, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    if HIGH:
        x = x >> 8
    return x.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def slots_apart(BLOCK_N: tl.constexpr, SHARES: tl.constexpr):
    """A tile's slots as `attend_apart` deals them out, `[SHARES, BLOCK_N // SHARES]`."""
    SHARE: tl.constexpr = BLOCK_N // SHARES
    return tl.arange(0, SHARES)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]


@triton.jit
def of_two(first, fade, second, more_fade):
    """`first * fade + second * more_fade`, rounded alike in every kernel: whichever product a compiler took into the
    sum, the last bit would depend on that."""
    return tl.fma(first, fade, second * more_fade)


@triton.jit
def over_shares(x, fade, SHARES: tl.constexpr):
    """Sum `[HALVES, SHARES, V, M]` over the second axis, each share times its `fade`, `[HALVES, SHARES, M]`. (Between
    two warps `tl.sum` would take forty barriers.)"""
    if SHARES == 2:
        first, second = tl.split(tl.permute(x, (0, 2, 3, 1)))
        one, other = tl.split(tl.permute(fade, (0, 2, 1)))
        return of_two(first, one[:, None, :], second, other[:, None, :])
    return tl.sum(x * fade[:, :, None, :], 1)


@triton.jit
def weighed(scores, held, most, total, factor):
    """A step of the softmax of each share: of scores `[SHARES, N, M]`, those `held`, what has been summed before by the
    largest scores and sums of weights `[SHARES, M]`.

    Returns:
        weights, by what to scale what was summed before, largest score, sum of weights.
    """
    scores = tl.where(held, scores, float("-inf"))
    peak = tl.maximum(most, tl.max(scores, 1) * factor)
    around = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores * factor - around[:, None, :])
    fade = tl.exp2(most - around)
    return weights, fade, peak, total * fade + tl.sum(weights, 1)


@triton.jit
def add_pairs(acc, odd, value, weights, fade, ASSEMBLY: tl.constexpr):
    """Values in pairs of e4m3, weighted, to the sums of the first and of the second of each."""
    weights = weights.to(tl.float16)
    acc = tl.dot(widened(value, False, ASSEMBLY), weights, acc * fade[:, None, :])
    odd = tl.dot(widened(value, True, ASSEMBLY), weights, odd * fade[:, None, :])
    return acc, odd


@triton.jit
def joined(
    acc, odd, most, total, PAIRS: tl.constexpr, HALVES: tl.constexpr, SHARES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """What the shares of each half have come to, `[HALVES * SHARES, ...]`, as one.

    Returns:
        weighted values `[HALVES, V, M]`, largest score and sum of weights `[HALVES, M]`.
    """
    PARTS: tl.constexpr = acc.shape[1]
    most = tl.reshape(most, (HALVES, SHARES, BLOCK_M))
    peak = tl.max(most, 1)
    around = tl.where(peak == float("-inf"), 0.0, peak)
    fade = tl.exp2(most - around[:, None, :])
    acc = over_shares(tl.reshape(acc, (HALVES, SHARES, PARTS, BLOCK_M)), fade, SHARES)
    total = over_shares(tl.reshape(total, (HALVES, SHARES, 1, BLOCK_M)), fade, SHARES)
    if PAIRS:
        odd = over_shares(tl.reshape(odd, (HALVES, SHARES, PARTS, BLOCK_M)), fade, SHARES)
        acc = tl.reshape(tl.permute(tl.join(acc, odd), (0, 1, 3, 2)), (HALVES, 2 * PARTS, BLOCK_M))
    return acc, peak, tl.reshape(total, (HALVES, BLOCK_M))


@triton.jit
def of_both(acc, most, total):
    """Two halves, along the last axis of weighted values `[V, M, 2]`, largest scores and sums of weights `[M, 2]`, as
    one; a second half that has nothing changes no bit."""
    acc, more_acc = tl.split(acc)
    most, more_most = tl.split(most)
    total, more_total = tl.split(total)
    peak = tl.maximum(most, more_most)
    around = tl.where(peak == float("-inf"), 0.0, peak)
    fade, more_fade = tl.exp2(most - around), tl.exp2(more_most - around)
    acc = of_two(acc, fade[None, :], more_acc, more_fade[None, :])
    return acc, peak, of_two(total, fade, more_total, more_fade)


@triton.jit
def half_of(start, stop, BLOCK_N: tl.constexpr):
    """Slots of the first half of a split: whole tiles, as many as the second half has or one more."""
    return tl.cdiv(stop - start, 2 * BLOCK_N) * BLOCK_N


@triton.jit
def queries(at, real, NARROW: tl.constexpr):
    """Queries `[SHARES, D, M]`; over pages in fp8 as float16, which is what is computed with there."""
    query = tl.load(at, mask=real, other=0.0)
    if NARROW:
        query = query.to(tl.float32)  # NaN stays
        query = tl.where(query > 65504.0, 65504.0, tl.where(query < -65504.0, -65504.0, query)).to(tl.float16)
    return query


@triton.jit
def attend_apart(
    query_at, real, key_pages, value_pages, table, next_pages, start, stop, low, fresh, scale, cap,
    KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARES: tl.constexpr, HALVES: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `attend` from nothing, with a tile's slots dealt out to `SHARES` warps, each with a softmax of its own.

    Products over a first axis of as many as there are warps give each warp one of them. So warps exchange neither
    maxima nor weights within a tile, which for one query takes longer than its arithmetic; they are merged once, at
    the end. Keys and values stand on the left: there a product has 16 lines at least, on the right 8, and queries are
    few.

    Pages in fp8 are computed with in float16. Values are turned on their way from shared memory, which can be done with
    two bytes, not with one: they come in pairs of elements, and either of a pair has sums of its own.

    With `HALVES` those of a split have sums of their own, as `attend_halved` makes them side by side: each query stands
    there twice, and sees the first half in the one column, the second in the other. (To hold the first's sums, or to
    store them on the way, takes 5 % longer.)

    With `OVERLAP` the first tiles are on their way before the kernels ahead have ended: those are awaited within the
    loop, where queries are needed first. (Queries then go through shared memory at every tile, which costs less.)

    Args:
        query_at: where queries lie, `[SHARES, D, M]`, those of `real`, with `HALVES` each of them twice; all see the
            slots up to `stop`, from `low` on (looked at if `WINDOWED`). KEY_DIM and VALUE_DIM are powers of two.
        next_pages: those of the first tile, as `slots_apart`.
        fresh: whether the kernel ahead stores the last slot before `stop`.

    Returns:
        weighted values `[V, M]`, largest score and sum of weights `[M]`, float32, of each query.
    """
    NARROW: tl.constexpr = (key_pages.dtype.element_ty == tl.float8e4nv) & (query_at.dtype.element_ty != tl.float32)
    PAIR: tl.constexpr = 2 if NARROW else 1
    DTYPE: tl.constexpr = tl.float16 if NARROW else query_at.dtype.element_ty
    if NARROW:
        value_pages = value_pages.to(tl.pointer_type(tl.int16))
    n = slots_apart(BLOCK_N, SHARES)
    middle = start + half_of(start, stop, BLOCK_N)
    second = tl.arange(0, BLOCK_M) % 2 == 1
    d = tl.arange(0, KEY_DIM)[None, None, :]
    v = tl.arange(0, VALUE_DIM // PAIR)[None, :, None]
    acc = tl.zeros([SHARES, VALUE_DIM // PAIR, BLOCK_M], tl.float32)
    odd = acc
    most = tl.full([SHARES, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([SHARES, BLOCK_M], tl.float32)
    query = tl.zeros([SHARES, KEY_DIM, BLOCK_M], DTYPE)
    if not OVERLAP:
        query = queries(query_at, real, NARROW)
    elif fresh & (stop - start <= STAGES * BLOCK_N):  # of so many tiles loads may have begun in the first round
        await_others(OVERLAP)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        slots = begin + n
        pages = next_pages  # one tile ahead, as in `attend`
        next_pages = load_pages(table, slots + BLOCK_N, stop, PAGE_SIZE)
        at_key = vectors(key_pages, pages, begin, n, KV_HEADS, PAGE_SIZE, KEY_DIM, BLOCK_N)[:, :, None] + d
        at_value = vectors(value_pages, pages, begin, n, KV_HEADS, PAGE_SIZE, VALUE_DIM // PAIR, BLOCK_N)
        held = slots < stop
        if WINDOWED:
            held = held & (slots >= low)
            key = tl.load(at_key, mask=held[:, :, None], other=0.0)
        else:
            key = tl.load(at_key)  # what no query sees may be anything, but for values
        value = tl.load(at_value[:, None, :] + v, mask=held[:, None, :], other=0.0)
        if OVERLAP and begin == start:
            await_others(OVERLAP)
            admit_next(OVERLAP)
            query = queries(query_at, real, NARROW)
        scores = tl.dot(key.to(DTYPE), query, input_precision=PRECISION)
        factor = scale
        if CAPPED:
            scores = softcapped(scores * scale, cap)
            factor = 1.0
        seen = held[:, :, None]
        if HALVES:
            seen = seen & ((begin >= middle) == second)[None, None, :]
        weights, fade, most, total = weighed(scores, seen, most, total, factor)
        if NARROW:
            acc, odd = add_pairs(acc, odd, value, weights, fade, OVERLAP)
        else:
            weights = weights.to(DTYPE)
            acc = tl.dot(value.to(DTYPE), weights, acc * fade[:, None, :], input_precision=PRECISION)
    acc, most, total = joined(acc, odd, most, total, NARROW, 1, SHARES, BLOCK_M)
    COUNT: tl.constexpr = BLOCK_M // 2 if HALVES else BLOCK_M
    if HALVES:
        acc, most, total = of_both(
            tl.reshape(acc, (VALUE_DIM, COUNT, 2)), tl.reshape(most, (COUNT, 2)), tl.reshape(total, (COUNT, 2))
        )
    return tl.reshape(acc, (VALUE_DIM, COUNT)), tl.reshape(most, (COUNT,)), tl.reshape(total, (COUNT,))
