"""Drafts of one row in the making, as a draft model grows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan

from hf_paged.plan import PlanRow
from hf_paged.speculation.drafter import kind_of, likelihood
from hf_paged.speculation.guide import Guide
from hf_paged.speculation.proposal import MOST_NODES

Grown = tuple[float, int, int, int, float]  # reach, parent, token, kind and odds of a draft


@dataclass(eq=False)
class Tree:
    """Drafts of one row in the making. Frontier: those whose children come next, one after another; -1 for the row's
    last token. `fed`: those whose KV the draft model has computed, on `pages` of the row."""

    planned: PlanRow
    deepest: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    odds: list[float] = field(default_factory=list)
    reach: list[float] = field(default_factory=list)
    frontier: list[int] = field(default_factory=lambda: [-1])
    fed: set[int] = field(default_factory=set)
    pages: list[int] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether two drafts follow the same token."""
        return self.parents != list(range(-1, len(self.parents) - 1))

    def path(self, node: int) -> list[int]:
        """Tokens from the row's last one to `node`."""
        path = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def children(
        self, node: int, reach: float, tokens: Sequence[int], probs: Sequence[float], guide: Guide, depth: int
    ) -> list[Grown]:
        """Drafts at `depth` behind `node`, which is reached so often, likeliest first.

        Raises:
            FloatingPointError: the draft model gave NaN.
        """
        grown = []
        for rank, (token, prob) in enumerate(zip(tokens, probs, strict=True)):
            if isnan(prob):
                raise FloatingPointError("the draft model's logits hold NaN")
            if prob >= guide.threshold:
                kind = kind_of(prob, rank)
                odds = guide.odds(self.planned, kind, depth, likelihood(prob, rank))
                grown.append((reach * odds, node, token, kind, odds))
        return grown

    def add(self, grown: Sequence[Grown], guide: Guide) -> None:
        """Take in drafts, as many as there is room for: the next frontier."""
        grown = grown[: MOST_NODES - len(self.tokens)]
        self.frontier = list(range(len(self.tokens), len(self.tokens) + len(grown)))
        for reach, parent, token, kind, odds in grown:
            self.tokens.append(token)
            self.parents.append(parent)
            self.kinds.append(kind)
            self.odds.append(odds)
            self.reach.append(reach)
        guide.add([entry[0] for entry in grown])
