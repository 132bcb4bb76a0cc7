"""Continuations seen before, in any text: prompts and outputs of all rows, indexed by what stands before each token.

After Oliaro et al., "SuffixDecoding", NeurIPS 2025. In place of suffix trees there are chains of hashes, as compressors
have them (LZ77): every place of every text is chained to the last place before which the same tokens stand, so that
upkeep is one step a token and memory is bounded; matches are measured, and what follows them counted, when asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from hf_paged.speculation.lookup import LONGEST_MATCH, agreement, continuation, match_kind
from hf_paged.speculation.proposal import MOST_NODES, Proposal

CONTEXT = 2  # tokens that are hashed
CANDIDATES = 12  # places of a chain that are looked at
LEAST_SHARE = 0.12  # of what was counted, to be proposed beside something likelier
SHARES = (0.2, 0.4, 0.6, 0.8, 0.95)


@dataclass(eq=False, slots=True)
class Text:
    """Tokens that are indexed. `tokens` belongs to a row, which appends to it.

    Attributes:
        salt: who may see it: texts of the same salt.
        read: tokens, from the first, that are indexed.
        last: number of its last entry.
    """

    tokens: list[int]
    salt: Hashable
    read: int = CONTEXT
    last: int = -1


class SuffixIndex:
    """Places in texts, chained by the tokens before them.

    Args:
        capacity: places that are remembered, the latest ones; rounded up to a power of two.
    """

    def __init__(self, capacity: int) -> None:
        self.size = 1 << (capacity - 1).bit_length()
        self._mask = self.size - 1
        self._heads = array("q", [-1]) * self.size  # by hash: number of the latest entry
        self._before = array("q", [-1]) * self.size  # by entry: the one before it in its chain
        self._places = array("i", [0]) * self.size  # by entry: index in its text of the token that follows
        self._texts: list[Text | None] = [None] * self.size
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, self.size)

    def open(self, tokens: list[int], salt: Hashable) -> Text:
        """Begin a text. It is read by `update`."""
        return Text(tokens, salt)

    def update(self, text: Text) -> None:
        """Take in what `text` has more than at the last call, but for its last token: what follows it is not known."""
        tokens, mask, heads = text.tokens, self._mask, self._heads
        before, places, texts, count = self._before, self._places, self._texts, self._count
        for at in range(text.read, len(tokens)):
            slot = (tokens[at - 1] * 0x9E3779B1 + tokens[at - 2] * 0x85EBCA77) >> 7 & mask
            here = count & mask
            before[here], places[here], texts[here] = heads[slot], at, text
            heads[slot] = count
            count += 1
        text.read, self._count = max(text.read, len(tokens)), count

    def matches(self, text: Text) -> list[tuple[int, Text, int]]:
        """Places with the same tokens before them as the end of `text`: length of the match, text and place."""
        tokens, end = text.tokens, len(text.tokens)
        if end < CONTEXT:
            return []
        slot = (tokens[-1] * 0x9E3779B1 + tokens[-2] * 0x85EBCA77) >> 7 & self._mask
        entry, oldest, found = self._heads[slot], self._count - self.size, []
        for _ in range(CANDIDATES):
            if entry < 0 or entry < oldest:
                break
            here = entry & self._mask
            other, at = self._texts[here], self._places[here]
            entry = self._before[here]
            if other.salt != text.salt or at >= len(other.tokens):  # the row was shortened since
                continue
            length = agreement(other.tokens, at, tokens, end, LONGEST_MATCH)
            if length >= CONTEXT:
                found.append((length, other, at))
        return found

    def propose(self, text: Text, depth: int, width: int) -> Proposal | None:
        """What followed the end of `text` elsewhere, up to `depth` tokens deep and `width` wide."""
        self.update(text)
        found = self.matches(text) if depth > 0 else []
        if not found:
            return None
        longest = max(length for length, _, _ in found)
        found = [entry for entry in found if 2 * entry[0] >= longest]
        if width == 1 or len(found) == 1:
            length, other, at = max(found, key=lambda entry: entry[0])
            kind = match_kind(length) * (len(SHARES) + 1) + len(SHARES)
            drafts = continuation(other.tokens, at, depth)
            return _chain(drafts, kind, _prior(length, 1.0))
        return _tree([(length, other.tokens[at : at + depth]) for length, other, at in found], width)


def _chain(drafts: Sequence[int], kind: int, odds: float) -> Proposal:
    count = len(drafts)
    return Proposal(tuple(drafts), tuple(range(-1, count - 1)), (kind,) * count, (odds,) * count, "suffix")


def _prior(length: int, share: float) -> float:
    return share * length / (length + 1)


def _tree(branches: list[tuple[int, Sequence[int]]], width: int) -> Proposal | None:
    """Merge continuations into a tree, likeliest first; each counts as much as its match is long."""
    tokens, parents, kinds, odds = [], [], [], []
    level = [(-1, [(length * length, length, branch) for length, branch in branches])]
    at = 0
    while level and len(tokens) + width <= MOST_NODES:
        grown = []
        for parent, members in level:
            total = sum(weight for weight, _, _ in members)
            by_token: dict[int, list] = {}
            for member in members:
                if at < len(member[2]):
                    by_token.setdefault(member[2][at], []).append(member)
            for token, group in by_token.items():
                share = sum(weight for weight, _, _ in group) / total
                if share >= LEAST_SHARE:
                    grown.append((share, parent, token, group))
        grown.sort(key=lambda entry: -entry[0])
        level = []
        for share, parent, token, group in grown[:width]:
            length = max(length for _, length, _ in group)
            level.append((len(tokens), group))
            tokens.append(token)
            parents.append(parent)
            kinds.append(match_kind(length) * (len(SHARES) + 1) + sum(share > bound for bound in SHARES))
            odds.append(_prior(length, share))
        at += 1
    if not tokens:
        return None
    return Proposal(tuple(tokens), tuple(parents), tuple(kinds), tuple(odds), "suffix")
