"""In which order a list of prompts is answered: depth first through the tree that they form.

So each common prefix is computed once, however small the pool: when its last prompt is done nobody needs it again.
Among branches the one with most to generate goes first: a list ends sooner so, since no long row is left to run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter

from hf_paged.prefix_cache import common_length


def depth_first(
    prompts: Sequence[list[int]], lengths: Sequence[int], known: Sequence[int], page_size: int
) -> list[int]:
    """Indices of `prompts` in the order in which to answer them.

    Prompts belong to one branch where they share at least a page of tokens beyond what they are known to share, or
    most of what is left of the shorter one. Branches whose tokens are in memory already go first.

    Args:
        prompts: token ids.
        lengths: tokens that each is to generate at most.
        known: tokens of each, from the first, whose KV is in memory.
        page_size: tokens a page.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    common = [0] + [common_length(prompts[a], prompts[b], 0, 1 << 60) for a, b in pairwise(order)]
    out: list[int] = []
    branches = [(0, len(order), 0)]  # sorted prompts [begin, end), and how many tokens all of them share
    while branches:
        begin, end, depth = branches.pop()
        if end - begin == 1:
            out.append(order[begin])
            continue
        urgency = []
        for first, last in _split([len(prompts[i]) for i in order[begin:end]], common[begin:end], depth, page_size):
            first, last = begin + first, begin + last
            members = order[first:last]
            cold = max(known[i] for i in members) < depth + page_size
            shared = min(common[first + 1 : last], default=0)
            urgency.append(((cold, -max(lengths[i] for i in members)), (first, last, shared)))
        urgency.sort(key=itemgetter(0), reverse=True)
        branches += [branch for _, branch in urgency]
    return out


def _split(lengths: list[int], common: list[int], depth: int, page_size: int) -> list[tuple[int, int]]:
    """Runs of neighbours that share more than `depth` tokens; `common[i]` is what prompts i - 1 and i share."""
    runs, first = [], 0
    for i in range(1, len(lengths)):
        gain = common[i] - depth
        if gain < page_size and 2 * gain <= min(lengths[i - 1], lengths[i]) - depth:
            runs.append((first, i))
            first = i
    return [*runs, (first, len(lengths))]
