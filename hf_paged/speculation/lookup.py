"""Prompt lookup: what followed the same n-gram earlier in the same row.

After Saxena, "Prompt Lookup Decoding", 2023, and LLMA (Yang et al., "Inference with Reference", 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hf_paged.speculation.proposal import Proposal

LONGEST_MATCH = 32
FEW_TOKENS = 8  # that are taken in one by one


class NgramIndex:
    """Where each n-gram of one row ended last.

    Args:
        size: longest n-gram.
    """

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0
        self._ends: dict[tuple[int, ...], int] = {}

    def update(self, tokens: Sequence[int]) -> None:
        """Take in the n-grams that end before the last token: of these it is known what follows."""
        ends, end = self._ends, len(tokens) - 1
        if self.read > end:  # the row was shortened
            self._ends, self.read = {}, 0
            ends = self._ends
        if end - self.read <= FEW_TOKENS:
            for stop in range(self.read + 1, end + 1):
                for size in range(1, min(self.size, stop) + 1):
                    ends[tuple(tokens[stop - size : stop])] = stop
        else:
            for size in range(1, self.size + 1):
                start = max(self.read + 1 - size, 0)
                window = [tokens[start + i : end + 1 - size + i] for i in range(size)]
                ends.update(zip(zip(*window, strict=False), range(start + size, end + 1), strict=False))
        self.read = end

    def find(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Where the longest n-gram that ends `tokens` ended before, and how many tokens before it agree too."""
        for size in range(min(self.size, len(tokens) - 1), 0, -1):
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                return end, size + agreement(tokens, end - size, tokens, len(tokens) - size, LONGEST_MATCH - size)
        return None


def agreement(a: Sequence[int], end_a: int, b: Sequence[int], end_b: int, most: int) -> int:
    """How many tokens before `end_a` of `a` equal those before `end_b` of `b`, up to `most`."""
    most = min(end_a, end_b, most)
    count = 0
    while count < most and a[end_a - 1 - count] == b[end_b - 1 - count]:
        count += 1
    return count


def continuation(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; behind the last one it goes on with itself, as a text that repeats would."""
    period = tokens[start : start + count]
    whole = -(-count // len(period)) if period else 0
    return (list(period) * whole)[:count]


def depth_behind(length: int, most: int, usual: int | None) -> int:
    """Drafts behind a match of `length` tokens: `usual`, or as many as it has where these are more; `most` at most.

    (After SuffixDecoding, see `suffix.py`.) Without `usual`: `most`.
    """
    return most if usual is None else min(most, max(usual, length))


def match_kind(length: int) -> int:
    """Lengths of matches that are alike: 1, 2, 3, up to 5, 8, 15, and longer ones."""
    return sum(length > bound for bound in (1, 2, 3, 5, 8, 15))


PRIOR = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # by `match_kind`, until something is known


def lookup(
    index: NgramIndex,
    tokens: Sequence[int],
    count: int,
    hopeful: Callable[[int], bool] | None = None,
    usual: int | None = None,
) -> Proposal | None:
    """Up to `count` tokens that followed the longest n-gram known.

    Args:
        hopeful: says of which kinds of matches drafts can be of use. Default: of all.
        usual: see `depth_behind`.
    """
    index.update(tokens)
    found = index.find(tokens) if count > 0 else None
    if found is None:
        return None
    start, length = found
    kind = match_kind(length)
    if hopeful is not None and not hopeful(kind):
        return None
    drafts = continuation(tokens, start, depth_behind(length, count, usual))
    return Proposal(
        tuple(drafts),
        tuple(range(-1, len(drafts) - 1)),
        (kind,) * len(drafts),
        (PRIOR[kind],) * len(drafts),
        "lookup",
    )
