"""What the draw kernel is made of: a row's scores, which of them the filters keep, and the noise of a token.

Nothing is sorted. Scores are compared as integers of the same order, so that a search by halves ends at the exact one;
probabilities are summed in integers, units of 2**-48, so that no order of summing can be seen.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x):
    """An integer for each float32 score that orders as it does; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def members(scores, ids, start, count, packed, temperature, BLOCK: tl.constexpr):
    """Tokens `start` and on of a row's `count`, and their scores over the temperature; -inf behind the last.

    `packed`: 1: the tokens are those that `ids` lists, 0: all.
    """
    place = start + tl.arange(0, BLOCK)
    there = place < count
    token = tl.where(packed > 0, tl.load(ids + place, mask=place < count * packed, other=0), place)
    x = tl.load(scores + token, mask=there, other=float("-inf")).to(tl.float32)
    return token, tl.div_rn(x, temperature)


@triton.jit
def weight_of(x, top):
    """exp of a score below the largest, float32: of a whole part and a rest (Cody and Waite, 1980).

    Cards that are not made for it compute float64 at a 64th of the speed.
    """
    below = tl.maximum(x - top, -104.0)  # where it is 0
    whole = tl.floor(below * 1.4426950408889634 + 0.5)
    rest = below - whole * 0.693145751953125 - whole * 1.42860682030941723e-06
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def units_of(x, top, total):
    """A probability as an integer. `total`: of all weights, float32."""
    return (tl.div_rn(weight_of(x, top), total) * 281474976710656.0).to(tl.int64)


@triton.jit
def gone(before, total, limit):
    """Whether top_p drops a token, by the units of all more probable ones and of all."""
    left = (total - before).to(tl.float64) * 3.552713678800501e-15
    return left.to(tl.float32) <= limit


@triton.jit
def largest(scores, ids, vocab, temperature, BLOCK: tl.constexpr):
    """The largest score of a row (NaN where there is one) and the lowest token that has it."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.full([BLOCK], 0, tl.int32)
    wrong = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        token, x = members(scores, ids, start, vocab, 0, temperature, BLOCK)
        wrong = wrong | (x != x).to(tl.int32)
        at = tl.where(x > best, token, at)
        best = tl.where(x > best, x, best)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, at, 2147483647), 0)
    return tl.where(tl.max(wrong, 0) > 0, float("nan"), top), chosen


@triton.jit
def weight_sum(scores, ids, count, packed, temperature, top, cut, BLOCK: tl.constexpr):
    """Weights of the members whose key is at least `cut`, summed in float64, as float32."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        _, x = members(scores, ids, start, count, packed, temperature, BLOCK)
        sums += tl.where(key_of(x) >= cut, weight_of(x, top), 0.0).to(tl.float64)
    return tl.sum(sums, 0).to(tl.float32)


@triton.jit
def amount_above(scores, ids, count, packed, temperature, top, total, key, cut, counted, BLOCK: tl.constexpr):
    """Of the members whose key is over `key` and at least `cut`: how many (`counted`), or their units. int64."""
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, BLOCK):
        _, x = members(scores, ids, start, count, packed, temperature, BLOCK)
        own = key_of(x)
        amount = (x > float("-inf")).to(tl.int64)
        if not counted:
            amount = units_of(x, top, total)
        sums += tl.where((own > key) & (own >= cut), amount, 0)
    return tl.sum(sums, 0)


@triton.jit
def amounts_near(scores, ids, vocab, temperature, top, total, counted, depth, step, BLOCK: tl.constexpr):
    """The same for scores within `depth`, and one to three steps more, of the largest, and for all."""
    first = tl.zeros([BLOCK], tl.int64)
    second = tl.zeros([BLOCK], tl.int64)
    third = tl.zeros([BLOCK], tl.int64)
    fourth = tl.zeros([BLOCK], tl.int64)
    every = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        _, x = members(scores, ids, start, vocab, 0, temperature, BLOCK)
        amount = (x > float("-inf")).to(tl.int64)
        if not counted:
            amount = units_of(x, top, total)
        first += tl.where(x > top - depth, amount, 0)
        second += tl.where(x > top - (depth + step), amount, 0)
        third += tl.where(x > top - (depth + 2 * step), amount, 0)
        fourth += tl.where(x > top - (depth + 3 * step), amount, 0)
        every += amount
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0), tl.sum(fourth, 0), tl.sum(every, 0)


@triton.jit
def enough(amount, whole, limit, n):
    """Whether top_k (where `n` is over 0), or top_p, keeps nothing below scores of so many, or so much."""
    return tl.where(n > 0, amount >= n, gone(amount, whole, limit))


@triton.jit
def reach(scores, ids, vocab, temperature, top, total, limit, n, BLOCK: tl.constexpr):
    """A bound below which the filter keeps nothing, not far from the last that it keeps; and the units of all tokens.

    Scores within 16, 32, 48 and 64 of the largest are looked at, then fifths of the step in which the last one lies.
    """
    depth = top * 0.0 + 16.0
    step = top * 0.0 + 16.0
    inner = top * 0.0
    outer = top * 0.0 + float("inf")
    whole = (top * 0.0).to(tl.int64)
    rounds = 0
    while rounds < 3:
        near = amounts_near(scores, ids, vocab, temperature, top, total, n > 0, depth, step, BLOCK)
        whole = near[4]
        held = near[3]
        before = depth + 3 * step
        found = outer
        for place in tl.static_range(3, -1, -1):
            ok = enough(near[place], whole, limit, n)
            edge = depth + place * step
            found = tl.where(ok, edge, found)
            held = tl.where(ok, near[place], held)
            before = tl.where(ok, inner if place == 0 else depth + (place - 1) * step, before)
        outer = found
        inner = before
        step = (outer - inner) / 5
        depth = inner + step
        done = (outer == float("inf")) | ((n > 0) & (held <= BLOCK))
        rounds = tl.where(done, 3, rounds + 1)
    return top - outer, whole


@triton.jit
def gather_above(scores, ids, vocab, temperature, bound, BLOCK: tl.constexpr):
    """List the tokens with scores over `bound` in `ids`, in order; how many they are."""
    count = 0
    for start in range(0, vocab, BLOCK):
        token, x = members(scores, ids, start, vocab, 0, temperature, BLOCK)
        inside = (x > bound).to(tl.int32)
        found = tl.sum(inside, 0)
        if found > 0:
            place = count + tl.cumsum(inside, 0) - 1
            tl.store(ids + place, token, mask=inside > 0)
        count += found
    tl.debug_barrier()
    return count


@triton.jit
def nth_key(scores, ids, count, temperature, n, low, high, BLOCK: tl.constexpr):
    """The least key of which at most the `n` largest scores and what ties with the last of them are not below.

    More than `n - 1` members are over `low`, fewer than `n` over `high`.
    """
    while high - low > 1:
        middle = low + (high - low) // 2
        found = amount_above(scores, ids, count, 1, temperature, 0.0, 1.0, middle, low, True, BLOCK)
        low = tl.where(found >= n, middle, low)
        high = tl.where(found == n, middle + 1, tl.where(found > n, high, middle))
    return high


@triton.jit
def nucleus_key(scores, ids, count, temperature, top, total, whole, limit, cut, low, high, BLOCK: tl.constexpr):
    """The least key whose first token top_p keeps, and the units before it.

    `whole`: units of all tokens in play. `low` is gone, `high` stays.
    """
    before = amount_above(scores, ids, count, 1, temperature, top, total, high, cut, False, BLOCK)
    while high - low > 1:
        middle = low + (high - low) // 2
        above = amount_above(scores, ids, count, 1, temperature, top, total, middle, cut, False, BLOCK)
        drops = gone(above, whole, limit)
        low = tl.where(drops, middle, low)
        high = tl.where(drops, high, middle)
        before = tl.where(drops, before, above)
    return high, before


@triton.jit
def ties_from(scores, ids, count, temperature, key, least, BLOCK: tl.constexpr):
    """How many members have this key and an id of at least `least`."""
    sums = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        token, x = members(scores, ids, start, count, 1, temperature, BLOCK)
        sums += ((key_of(x) == key) & (token >= least) & (x > float("-inf"))).to(tl.int32)
    return tl.sum(sums, 0)


@triton.jit
def least_tie(scores, ids, count, vocab, temperature, key, before, units, whole, limit, BLOCK: tl.constexpr):
    """The least id that top_p keeps of the tokens that share the last key it keeps: higher ids come first."""
    ties = ties_from(scores, ids, count, temperature, key, 0, BLOCK)
    room = 1
    over = ties + 1
    while over - room > 1:
        middle = room + (over - room) // 2
        drops = gone(before + (middle - 1).to(tl.int64) * units, whole, limit)
        over = tl.where(drops, middle, over)
        room = tl.where(drops, room, middle)
    low = 0
    high = vocab
    while (room < ties) & (high - low > 1):
        middle = low + (high - low) // 2
        enough = ties_from(scores, ids, count, temperature, key, middle, BLOCK) >= room
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def words_of(token, seed, position):
    """The 32 bits of each token: Philox4x32-10 of (token // 4, position), word token % 4."""
    block = token >> 2
    first, second, third, fourth = tl.philox(seed, block, block * 0 + position, block * 0, block * 0)
    low = tl.where((token & 1) == 0, first, second)
    high = tl.where((token & 1) == 0, third, fourth)
    return tl.where((token & 2) == 0, low, high)


@triton.jit
def words_from(start, seed, position, BLOCK: tl.constexpr):
    """The same for tokens `start` (a multiple of 4) and on: a call of Philox for four."""
    block = start // 4 + tl.arange(0, BLOCK // 4)
    first, second, third, fourth = tl.philox(seed, block, block * 0 + position, block * 0, block * 0)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK])


@triton.jit
def noisy(x, words):
    """Score + standard Gumbel noise, float64."""
    uniform = (words.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return x.to(tl.float64) - tl.log(-tl.log(uniform))
