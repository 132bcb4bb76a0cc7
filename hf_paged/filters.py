"""Temperature, top-k, top-p, min-p, and the draw: scores of sampling rows to tokens.

What is kept is defined once, as transformers' warpers define it (`keep_mask`); `draw` reaches the same tokens
without that where the kept tokens are few. A row's result does not depend on the other rows of its batch:
probabilities are summed as integers, so that no order of summing can be seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.kernels.backends import runs_triton
from hf_paged.kernels.native_sampling import SamplingOps, sampling_ops
from hf_paged.noise import gumbel, gumbel_dense, seed_bits
from hf_paged.params import SamplingParams

WINDOW = 64  # this many of a row's largest scores are looked at first; a longer torch.topk is much slower
_UNIT = 2.0**48  # probabilities are summed in units of 2**-48, exact for float32 ones above 2**-24
_BUCKETS = 1024
_PER_NAT = 64.0  # buckets a nat: they reach 16 nats below the largest score, the last holds all that is below
_DENSE_TOKENS = 1 << 18  # whole vocabularies are drawn from in pieces of this many tokens, to stay in cache


@dataclass(frozen=True, slots=True)
class DrawTensors:
    """The parameters of R sampling rows, on the scores' device.

    temperature, min_p: float32 [R, 1]. limit: float32 [R, 1], 1 - top_p, or -1 where top_p is off.
    top_k: int64 [R, 1], 0 where off. seeds (as bits), positions: int64 [R].
    largest_k, any_top_p, any_min_p, any_temperature: known to the host, so that idle filters cost nothing.
    """

    temperature: torch.Tensor
    limit: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    largest_k: int
    any_top_p: bool
    any_min_p: bool
    any_temperature: bool

    def arrays(self) -> tuple[torch.Tensor, ...]:
        """The tensors alone, as compiled ops take them."""
        return self.temperature, self.limit, self.min_p, self.top_k, self.seeds, self.positions

    def pick(self, rows: torch.Tensor) -> "DrawTensors":
        """The same for some rows (int64 [n])."""
        names = ("temperature", "limit", "min_p", "top_k", "seeds", "positions")
        picked = [getattr(self, name)[rows] for name in names]
        return DrawTensors(*picked, self.largest_k, self.any_top_p, self.any_min_p, self.any_temperature)


def draw_tensors(
    params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int], device: torch.device
) -> DrawTensors:
    """Gather the parameters of some rows into tensors on `device`."""
    limits = [1.0 - p.top_p if p.top_p < 1.0 else -1.0 for p in params]
    top_k = [max(p.top_k, 0) for p in params]
    floats = [[p.temperature for p in params], limits, [p.min_p for p in params]]
    whole = [top_k, [seed_bits(seed) for seed in seeds], list(positions)]
    temperature, limit, min_p = torch.tensor(floats, dtype=torch.float32, device=device).unsqueeze(-1)
    ks, seed_tensor, position_tensor = torch.tensor(whole, dtype=torch.int64, device=device)
    return DrawTensors(
        temperature,
        limit,
        min_p,
        ks[:, None],
        seed_tensor,
        position_tensor,
        largest_k=max(top_k),
        any_top_p=max(limits) >= 0.0,
        any_min_p=any(floats[2]),
        any_temperature=any(value != 1.0 for value in floats[0]),
    )


def compiled(scores: torch.Tensor) -> SamplingOps | None:
    """Compiled ops that draw from `scores` as `draw` does; None where there are none."""
    return sampling_ops() if scores.device.type == "cpu" and scores.dtype == torch.float32 else None


def draw_at_once(logits: torch.Tensor, rows: Sequence[tuple[SamplingParams, int, int]]) -> list[int] | None:
    """A token a row from logits float32 [R, V], for rows of (parameters, seed, position), by compiled ops alone.

    None where there are none, or where a row's logits are not finite: who asks finds out which, and why.
    """
    ops = compiled(logits)
    if ops is None:
        return None
    tokens, tops = ops.draw(logits, *draw_arrays(rows))
    return tokens if all(map(math.isfinite, tops)) else None


def draw_arrays(rows: Sequence[tuple[SamplingParams, int, int]]) -> tuple[np.ndarray, ...]:
    """What compiled ops take of rows of (parameters, seed, position): the fields of `DrawTensors`, in less time."""
    floats = np.array([(p.temperature, 1.0 - p.top_p if p.top_p < 1.0 else -1.0, p.min_p) for p, _, _ in rows], "f4").T
    whole = np.array([(max(p.top_k, 0), seed_bits(seed), place) for p, seed, place in rows], np.int64).T
    return *np.ascontiguousarray(floats), *np.ascontiguousarray(whole)


def drawing_ops(scores: torch.Tensor):
    """What draws from `scores` as `draw` does: compiled ops on a CPU, Triton's kernel on a GPU; None: torch's ops."""
    if scores.device.type == "cpu":
        return compiled(scores)
    if scores.dtype != torch.float32 or not runs_triton(scores.device.type, "auto"):
        return None
    from hf_paged.kernels.draw import DrawOps

    return DrawOps()


def warm(scores: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """Scores float32 [R, V] divided by each row's temperature."""
    return scores / given.temperature if given.any_temperature else scores


def draw(scores: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """Draw a token a row from softmax of scores (float32 [R, V], temperature applied) after the filters.

    Returns int64 [R]. Equal to `draw_dense(filtered(scores, given), given)`, the plain way.
    """
    size = min(max(WINDOW, given.largest_k + 1), scores.shape[1])
    if size > 4 * WINDOW:
        return draw_dense(filtered(scores, given), given)
    values, ids = scores.topk(size, dim=1)
    kept, enough = _window(scores, values, ids, given)
    tokens = _draw_window(values, ids, kept & enough[:, None], given)
    if not bool(enough.all()):
        rest = (~enough).nonzero().squeeze(1)
        part = given.pick(rest)
        tokens[rest] = draw_dense(filtered(scores[rest], part), part)
    return tokens


def draw_dense(scores: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """Draw a token a row from softmax of scores float32 [R, V], every token in play. Returns int64 [R]."""
    rows, vocab = scores.shape
    step = max(1, _DENSE_TOKENS // vocab)
    tokens = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        noise = gumbel_dense(given.seeds[part], given.positions[part], vocab)
        tokens.append(noise.add_(scores[part]).argmax(dim=1))
    return torch.cat(tokens)


def filtered(scores: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """Scores float32 [R, V], temperature applied, with -inf for what the filters drop."""
    return _drop(scores, ~keep_mask(scores, given))


def _drop(scores: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """scores.masked_fill(gone, -inf) for finite or -inf scores float32; on a CPU a tenth of that one's time."""
    below = gone.float().mul_(torch.finfo(torch.float32).max)
    return scores.sub(below).sub_(below).sub_(below)


def keep_mask(scores: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """What top_k, then top_p, then min_p keep of scores float32 [R, V], temperature applied.

    top_k: scores not below the k-th largest, so all that tie with it. top_p: a token goes if it and all less
    probable ones together have at most 1 - top_p; of equal scores the lower ids count as less probable, which
    is how transformers' sort leaves them. min_p: probabilities not below min_p times the largest. The most
    probable token always stays. Returns bool [R, V].
    """
    kept = torch.ones_like(scores, dtype=torch.bool)
    if given.largest_k:
        kept &= scores >= _kth_score(scores, given)
        scores = _drop(scores, ~kept)
    if given.any_top_p or given.any_min_p:
        probs = scores.softmax(dim=1)
    if given.any_top_p:
        kept &= _top_p_mask(scores, probs, given.limit)
    if given.any_min_p:
        kept &= probs >= given.min_p * probs.amax(dim=1, keepdim=True)
    return kept


def _kth_score(scores: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """Each row's k-th largest of scores float32 [R, n]; -inf where top_k is off. Returns float32 [R, 1]."""
    largest = scores.topk(min(given.largest_k, scores.shape[1]), dim=1).values
    kth = largest.gather(1, (given.top_k - 1).clamp(0, largest.shape[1] - 1))
    return kth.masked_fill(given.top_k == 0, -torch.inf)


def _units(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities float32 as integers, int64, so that their sums have no rounding and no order."""
    return (probs * _UNIT).long()


def _gone(before: torch.Tensor, total: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Whether top_p drops tokens, given the sum of all more probable ones and of all (int64, in units).

    What is left for a token and those below it is compared in float32, to fall as it does in transformers
    where it hits the limit exactly.
    """
    return ((total - before).double() / _UNIT).float() <= limit


def _window(
    scores: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, given: DrawTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """`keep_mask` for the n largest scores of each row (values, ids: [R, n], sorted).

    Returns what is kept, bool [R, n], and which rows keep nothing beyond it, bool [R].
    """
    kept = values > -torch.inf
    if given.largest_k:
        kth = _kth_score(values, given)
        kept &= values >= kth
    if given.any_top_p or given.any_min_p:
        if given.largest_k:
            scores = _drop(scores, scores < kth)
        all_probs = scores.softmax(dim=1)
        probs = all_probs.gather(1, ids)
    beyond = torch.zeros_like(kept[:, :1])
    if given.any_top_p:
        units = _units(probs)
        total = _units(all_probs).sum(dim=1, keepdim=True)
        gone = _gone(units.cumsum(dim=1) - units, total, given.limit)
        gone[:, 0] = False
        stays, last = _settle_ties(values, ids, ~gone)
        kept &= stays
        beyond = values[:, -1:] == last  # scores out of sight may tie with these
    if given.any_min_p:
        kept &= probs >= given.min_p * probs[:, :1]
    if values.shape[1] == scores.shape[1]:
        return kept, torch.ones_like(kept[:, 0])
    # Filters keep the first of the sorted scores: if the last one here goes, so does all beyond it.
    return kept, ~(beyond | kept[:, -1:]).squeeze(1)


def _settle_ties(values: torch.Tensor, ids: torch.Tensor, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a cut falls between equal scores, keep the higher ids: torch.topk leaves equal scores in any order.

    values float32 [R, n], falling; ids int64 [R, n]; stays bool [R, n], the first few of each row. Returns as
    many to keep, bool [R, n], and the last score kept, float32 [R, 1].
    """
    last = values.gather(1, (stays.sum(dim=1, keepdim=True) - 1).clamp_(min=0))
    equal = values == last
    room = (equal & stays).sum(dim=1, keepdim=True)
    if torch.equal(room, equal.sum(dim=1, keepdim=True)):
        return stays, last
    ranked = ids.masked_fill(~equal, -1).sort(dim=1, descending=True).values
    lowest = ranked.gather(1, (room - 1).clamp_(min=0))
    return (stays & ~equal) | (equal & (ids >= lowest) & (room > 0)), last


def _draw_window(values: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, given: DrawTensors) -> torch.Tensor:
    """Gumbel-max over the kept entries of values float32 [R, n] and ids int64 [R, n]. Returns int64 [R].

    The lowest id wins a tie, as argmax has it over a whole vocabulary.
    """
    rows, places = kept.nonzero(as_tuple=True)
    noisy = torch.full(values.shape, -torch.inf, dtype=torch.float64, device=values.device)
    noise = gumbel(given.seeds[rows], given.positions[rows], ids[rows, places])
    noisy[rows, places] = noise.add_(values[rows, places])
    best = noisy == noisy.amax(dim=1, keepdim=True)
    return ids.masked_fill(~best, torch.iinfo(torch.int64).max).amin(dim=1)


def _top_p_mask(scores: torch.Tensor, probs: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """What top_p keeps of scores, probs: float32 [R, V]. Returns bool [R, V].

    Scores are summed up in buckets, and only the bucket in which the cut falls is sorted.
    """
    gap = (scores.amax(dim=1, keepdim=True) - scores).mul_(_PER_NAT).clamp_(max=_BUCKETS - 1)
    bucket = gap.long()
    units = _units(probs)
    sums = units.new_zeros(len(scores), _BUCKETS).scatter_add_(1, bucket, units)
    above = sums.cumsum(dim=1) - sums
    total = sums.sum(dim=1, keepdim=True)
    gone = _gone(above, total, limit)
    gone[:, 0] = False
    cut = (~gone).sum(dim=1, keepdim=True) - 1
    member = bucket == cut
    counts = member.sum(dim=1, keepdim=True)
    values, ids = _drop(scores, ~member).topk(max(int(counts.max()), 1), dim=1)  # members first
    inside = units.gather(1, ids)
    stays = ~_gone(above.gather(1, cut) + inside.cumsum(dim=1) - inside, total, limit)
    stays[:, 0] = True  # the first of a bucket that is not gone as a whole stays
    stays &= torch.arange(values.shape[1], device=scores.device) < counts
    stays, _ = _settle_ties(values, ids, stays)
    kept = bucket < cut
    return kept.scatter_(1, ids, kept.gather(1, ids) | stays)
