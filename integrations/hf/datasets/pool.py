"""How many pages a run should have on a CPU: memory for its rows, not a share of the machine's.

An engine's own default is a share of the memory, and the prefix cache fills what it gets: over a million rows it would
keep what no later row asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hf_paged.prefix_cache import common_length

SLACK = 1.25


def pages_for(prompts: Sequence[list[int]], rows: int, max_tokens: int, page_size: int, longest: int) -> int:
    """Pages for `rows` rows at once that are like `prompts`, which share their prefixes; two of the longest fit always.

    Args:
        prompts: token ids of some rows.
        max_tokens: that each row generates at most.
        longest: tokens that a row may have.
    """
    least = 2 * (-(-longest // page_size) + 1)
    if not prompts:
        return least
    ordered = sorted(prompts)
    shared = [0, *(common_length(a, b, 0, 1 << 60) for a, b in pairwise(ordered)), 0]
    private = [len(ids) - max(shared[i : i + 2]) for i, ids in enumerate(ordered)]
    distinct = sum(len(ids) - shared[i] for i, ids in enumerate(ordered))
    pages = (sum(private) / len(private) + max_tokens) / page_size + 1
    return max(least, int(SLACK * (rows * pages + (distinct - sum(private)) / page_size)))
