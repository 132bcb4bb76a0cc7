"""Continuations seen before, in any text: prompts and outputs of all rows, indexed by what stands before each token.

After Oliaro et al., "SuffixDecoding", NeurIPS 2025. In place of suffix trees there are chains of hashes, as compressors
have them (LZ77): every place of every text is chained to the last place before which the same tokens stand, so that
upkeep is one step a token and memory is bounded; matches are measured, and what follows them counted, when asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_paged.kernels.native_chains import chain_op
from hf_paged.speculation.lookup import LONGEST_MATCH, agreement, continuation, depth_behind, match_kind
from hf_paged.speculation.proposal import MOST_NODES, Proposal

CONTEXTS = SHORT, MIDDLE, LONG = 1, 2, 6  # tokens that are hashed: places with more in common are looked at first
CANDIDATES = 12  # places of a chain that are looked at; of the last one as many more as the others had too few
SURE = 12  # a match of so many tokens is followed alone; beside shorter ones stands what else was seen
LEAST_SHARE = 0.03  # of what was counted, to be proposed beside something likelier
LEAST_REACH = 0.02  # estimate for a draft that the target comes by it, to be proposed
FEW = 2  # tokens that are taken in sooner than a compiled op is called
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)


@dataclass(eq=False, slots=True)
class Text:
    """Tokens that are indexed. `tokens` belongs to a row, which appends to it.

    Attributes:
        salt: who may see it: texts of the same salt.
        read: tokens, from the first, that are indexed.
        following: the text that it repeated at the last look, and how far the place there lies before its own.
    """

    tokens: list[int]
    salt: Hashable
    read: int = SHORT
    following: tuple[Text, int] | None = None


class Chain:
    """Places by a hash of the tokens before them: the latest entry, and for each entry the one before it."""

    def __init__(self, size: int) -> None:
        self.heads = array("q", [-1]) * size
        self.before = array("q", [-1]) * size


def _slots(tokens: Sequence[int], end: int) -> list[int]:
    """Hashes of the last one, two and six tokens before `end`, as far as there are so many; `chains.c` has the same."""
    one = tokens[end - 1] * 0x9E3779B1
    slots = [one >> 7]
    if end >= MIDDLE:
        mixed = one + tokens[end - 2] * 0x85EBCA77
        slots.append(mixed >> 7)
        if end >= LONG:
            for token in (tokens[end - 3], tokens[end - 4], tokens[end - 5], tokens[end - 6]):
                mixed = (mixed ^ token) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            slots.append(mixed >> 32)
    return slots


class SuffixIndex:
    """Places in texts, chained by the tokens before them.

    Args:
        capacity: places that are remembered, the latest ones; rounded up to a power of two.
    """

    def __init__(self, capacity: int) -> None:
        self.size = 1 << (capacity - 1).bit_length()
        self._mask = self.size - 1
        self._chains = [Chain(self.size) for _ in CONTEXTS]
        heads, before = ([getattr(chain, name) for chain in self._chains] for name in ("heads", "before"))
        self._op = chain_op(*([np.frombuffer(part, np.int64) for part in parts] for parts in (heads, before)))
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
        tokens, begin, end = text.tokens, text.read, len(text.tokens)
        while begin < end:
            first = self._count & self._mask
            most = min(end, begin + self.size - first)  # up to where entries begin anew
            self._places[first : first + most - begin] = array("i", range(begin, most))
            self._texts[first : first + most - begin] = [text] * (most - begin)
            self._chain(tokens, begin, most)
            self._count += most - begin
            text.read = begin = most

    def _chain(self, tokens: Sequence[int], begin: int, end: int) -> None:
        """Entries from the next one on are places `begin` to `end`."""
        if self._op is not None and end - begin > FEW:
            first = max(begin - LONG, 0)
            self._op(tokens[first:end], first, begin, end, self._count)
            return
        for at in range(begin, end):
            here, slots = self._count + at - begin, _slots(tokens, at)
            for kind, chain in enumerate(self._chains):
                if kind < len(slots):
                    slot = slots[kind] & self._mask
                    chain.before[here & self._mask], chain.heads[slot] = chain.heads[slot], here
                else:
                    chain.before[here & self._mask] = -1

    def matches(self, text: Text) -> list[tuple[int, Text, int]]:
        """Places with the same tokens before them as the end of `text`: length of the match, text and place."""
        tokens, end, found = text.tokens, len(text.tokens), []
        if text.following is not None:
            other, behind = text.following
            self._measure(text, other, end + behind, found)
        slots = _slots(tokens, end)
        for kind in reversed(range(len(slots))):
            if any(match >= SURE for match, _, _ in found):
                break
            count = CANDIDATES if kind else 3 * CANDIDATES - len(found)
            self._walk(self._chains[kind], slots[kind] & self._mask, count, text, found)
        if not found:
            return found
        length, other, at = best = max(found, key=lambda entry: entry[0])
        text.following = other, at - end
        return [best] if length >= SURE else list({(id(other), at): (n, other, at) for n, other, at in found}.values())

    def _walk(self, chain: Chain, slot: int, most: int, text: Text, found: list[tuple[int, Text, int]]) -> None:
        """Add the latest matches of a chain to `found`, `most` at most."""
        entry, oldest = chain.heads[slot], self._count - self.size
        for _ in range(most):
            if entry < 0 or entry < oldest:
                return
            here = entry & self._mask
            entry = chain.before[here]
            self._measure(text, self._texts[here], self._places[here], found)

    @staticmethod
    def _measure(text: Text, other: Text, at: int, found: list[tuple[int, Text, int]]) -> None:
        if other.salt != text.salt or not 0 < at < len(other.tokens):  # the row may have been shortened since
            return
        length = agreement(other.tokens, at, text.tokens, len(text.tokens), LONGEST_MATCH)
        if length >= SHORT:
            found.append((length, other, at))

    def followed(self, text: Text) -> tuple[Text, int] | None:
        """The text that `text` repeats without doubt, and the place there of what comes next."""
        self.update(text)
        length, other, at = max(self.matches(text), key=lambda entry: entry[0], default=(0, text, 0))
        return (other, at) if length >= SURE else None

    def propose(self, text: Text, depth: int, width: int, usual: int | None = None) -> Proposal | None:
        """What followed the end of `text` elsewhere, up to `depth` tokens deep and `width` wide.

        `usual`: see `depth_behind`.
        """
        self.update(text)
        found = self.matches(text) if depth > 0 else []
        if not found:
            return None
        length, other, at = max(found, key=lambda entry: entry[0])
        depth = depth_behind(length, depth, usual)
        if width == 1 or len(found) == 1:
            return _chain(continuation(other.tokens, at, depth), *alone(match_kind(length), length))
        return _tree([(length, other.tokens[at : at + depth]) for length, other, at in found], width)


def _chain(drafts: Sequence[int], kind: int, odds: float) -> Proposal:
    count = len(drafts)
    return Proposal(tuple(drafts), tuple(range(-1, count - 1)), (kind,) * count, (odds,) * count, "suffix")


def alone(kind: int, length: int) -> tuple[int, float]:
    """Of a draft that nothing stands beside, behind a match of that kind and length: its kind and estimate."""
    return kind * (len(SHARES) + 1) + len(SHARES), _prior(length, 1.0)


def _prior(length: int, share: float) -> float:
    return share * length / (length + 1)


def _tree(branches: list[tuple[int, Sequence[int]]], width: int) -> Proposal | None:
    """Merge continuations into a tree, likeliest first; each counts as much as its match is long."""
    tokens, parents, kinds, odds = [], [], [], []
    level = [(-1, 1.0, [(length * length, length, branch) for length, branch in branches])]
    at = 0
    while level and len(tokens) + width <= MOST_NODES:
        grown = []
        for parent, reach, members in level:
            total = sum([weight for weight, _, _ in members])
            by_token: dict[int, list] = {}
            for member in members:
                if at < len(member[2]):
                    by_token.setdefault(member[2][at], []).append(member)
            for token, group in by_token.items():
                share = sum([weight for weight, _, _ in group]) / total
                length = max([length for _, length, _ in group])
                likely = reach * _prior(length, share)
                if share >= LEAST_SHARE and likely >= LEAST_REACH:
                    grown.append((share, likely, parent, token, length, group))
        grown.sort(key=lambda entry: -entry[0])
        level = []
        for share, likely, parent, token, length, group in grown[:width]:
            level.append((len(tokens), likely, group))
            tokens.append(token)
            parents.append(parent)
            kinds.append(match_kind(length) * (len(SHARES) + 1) + sum([share > bound for bound in SHARES]))
            odds.append(_prior(length, share))
        at += 1
    if not tokens:
        return None
    return Proposal(tuple(tokens), tuple(parents), tuple(kinds), tuple(odds), "suffix")
