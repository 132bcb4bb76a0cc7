"""Tokens from logits, a row a program: temperature, top_k, top_p, min_p, and the largest of score + keyed noise.

What is kept, and which token is drawn, is what the engine room's `filters.py` and `noise.py` say, without a sort: a
few passes over a row find how far below the largest score the filters can reach, what lies over that is listed, and the
exact cut is searched in the list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.backends import with_fallback
from hf_paged.kernels.selection import (
    amount_above,
    gather_above,
    key_of,
    largest,
    least_tie,
    members,
    noisy,
    nth_key,
    nucleus_key,
    reach,
    units_of,
    weight_of,
    weight_sum,
    words_from,
    words_of,
)

BLOCK, WARPS = 4096, 16


@triton.jit(do_not_specialize=["vocab", "rows"])
def draw_kernel(
    logits,
    line,
    vocab,
    rows,
    temperatures,
    limits,
    min_ps,
    top_ks,
    seeds,
    positions,
    listed,
    out,
    BLOCK: tl.constexpr,
):
    """One row; a temperature of 0 takes the largest logit.

    `out`: int32 `[2, rows]`, tokens and the bits of the largest score over the temperature: where that is not finite,
    the token is -1. `listed`: int32 `[rows, vocab]`, for tokens that filters may keep.
    """
    row = tl.program_id(0)
    scores = logits + row.to(tl.int64) * line
    ids = listed + row.to(tl.int64) * vocab
    asked = tl.load(temperatures + row)
    temperature = tl.where(asked > 0, asked, 1.0)
    top, chosen = largest(scores, ids, vocab, temperature, BLOCK)
    fine = (top > float("-inf")) & (top < float("inf"))
    tl.store(out + rows + row, top.to(tl.int32, bitcast=True))
    tl.store(out + row, tl.where(fine, chosen, -1))
    if (asked > 0) & fine:
        limit = tl.load(limits + row)
        min_p = tl.load(min_ps + row)
        n = tl.load(top_ks + row)
        n = tl.where(n < vocab, n, 0)
        cut = key_of(top * 0.0 + float("-inf")).to(tl.int64)
        least = 0
        count = vocab
        packed = ((n > 0) | (limit >= 0)).to(tl.int32)
        total = top * 0.0 + 1.0
        if (n <= 0) & ((limit >= 0) | (min_p > 0)):
            total = weight_sum(scores, ids, vocab, 0, temperature, top, cut, BLOCK)
        if packed > 0:
            bound, whole = reach(scores, ids, vocab, temperature, top, total, limit, n, BLOCK)
            count = gather_above(scores, ids, vocab, temperature, bound, BLOCK)
            low = key_of(bound).to(tl.int64)
            high = key_of(top).to(tl.int64)
            if n > 0:
                if count >= n:
                    cut = nth_key(scores, ids, count, temperature, n, low, high, BLOCK)
                    low = cut - 1
                total = weight_sum(scores, ids, count, 1, temperature, top, cut, BLOCK)
                whole = amount_above(scores, ids, count, 1, temperature, top, total, low, cut, False, BLOCK)
            if limit >= 0:
                cut, before = nucleus_key(
                    scores, ids, count, temperature, top, total, whole, limit, cut, low, high, BLOCK
                )
                bits = cut.to(tl.int32)
                edge = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
                units = units_of(edge, top, total)
                least = least_tie(scores, ids, count, vocab, temperature, cut, before, units, whole, limit, BLOCK)
        floor = min_p * tl.div_rn(top * 0.0 + 1.0, total)
        best = tl.full([BLOCK], float("-inf"), tl.float64)
        at = tl.full([BLOCK], 0, tl.int32)
        seed = tl.load(seeds + row)
        position = tl.load(positions + row).to(tl.int32)
        for start in range(0, count, BLOCK):
            token, x = members(scores, ids, start, count, packed, temperature, BLOCK)
            own = key_of(x)
            kept = (x > float("-inf")) & ((own > cut) | ((own == cut) & (token >= least)))
            if min_p > 0:
                kept = kept & (tl.div_rn(weight_of(x, top), total) >= floor)
            if packed > 0:  # noqa: SIM108
                words = words_of(token, seed, position)
            else:
                words = words_from(start, seed, position, BLOCK)
            value = tl.where(kept, noisy(x, words), float("-inf"))
            at = tl.where(value > best, token, at)
            best = tl.where(value > best, value, best)
        most = tl.max(best, 0)
        tl.store(out + row, tl.min(tl.where(best == most, at, 2147483647), 0))


def draw(
    scores: torch.Tensor,
    temperature: torch.Tensor,
    limit: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token a row, from logits of any float dtype `[rows, vocab]`, elements of a row one after another.

    Args:
        temperature, limit, min_p: float32, an entry a row; a temperature of 0 is greedy, `limit` is 1 - top_p or -1.
        top_k: int64, 0: off. seeds (as bits), positions: int64.
        out: int32 `[2, rows]`; made where it is not given.

    Returns:
        `out`: tokens, and the bits of the largest score over the temperature (see `draw_kernel`).
    """
    rows, vocab = scores.shape
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    out = torch.empty(2, rows, dtype=torch.int32, device=scores.device) if out is None else out
    listed = torch.empty(rows, vocab, dtype=torch.int32, device=scores.device)
    given = temperature, limit, min_p, top_k, seeds, positions
    draw_kernel[(rows,)](scores, scores.stride(0), vocab, rows, *given, listed, out, BLOCK=BLOCK, num_warps=WARPS)
    return out


class DrawOps:
    """Draws on the device, with the signature of the compiled ops on a CPU."""

    def draw(self, scores: torch.Tensor, *parameters: torch.Tensor) -> tuple[list[int] | None, list[float] | None]:
        """A token for each row and the largest of its scores over the temperature: where that is not finite, -1.

        Nothing, where the kernel does not compile on this card.
        """
        out = with_fallback(draw, lambda *_: None, scores, *parameters)
        if out is None:
            return None, None
        tokens, tops = out.cpu()
        return tokens.tolist(), tops.view(torch.float32).tolist()
