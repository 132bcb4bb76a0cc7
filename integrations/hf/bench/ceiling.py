"""The speed that measured acceptance and measured costs allow: what no bookkeeping can beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from hf_paged.speculation.proposal import MOST_NODES

Seconds = Callable[[float], float]  # of a forward, by how many tokens it computes


@dataclass(frozen=True)
class Source:
    """One proposer as it was measured.

    Attributes:
        odds: for each depth the odds that the draft of each rank there (the likeliest first) is the target's token,
            once a draft of the depth before was.
        share: share of rows for which it drafts in a step, 0 to 1.
        draft: of a draft model's forward, one a depth; None: drafts cost nothing.
    """

    odds: tuple[tuple[float, ...], ...]
    share: float = 1.0
    draft: Seconds | None = None

    def cells(self) -> Iterator[tuple[float, int]]:
        """How often each draft would be taken, and its depth."""
        reach = 1.0
        for depth, odds in enumerate(self.odds, 1):
            yield from ((reach * one, depth) for one in odds)
            reach *= sum(odds)

    def trees(self, most: int) -> Iterator[Tree]:
        """For every depth and number of drafts up to `most` the tree that is taken furthest; first of all, none."""
        yield Tree(0, 0, 0.0)
        cells = list(self.cells())
        for depth in range(1, len(self.odds) + 1):
            best = sorted((reach for reach, at in cells if at <= depth), reverse=True)
            for nodes in range(depth, min(len(best), most) + 1):
                yield Tree(depth, nodes, sum(best[:nodes]))


@dataclass(frozen=True)
class Tree:
    """Drafts of one row: how deep, how many, and how many of them are taken on average."""

    depth: int
    nodes: int
    taken: float


@dataclass(frozen=True)
class Ceiling:
    """The best step: tokens a second, and the trees that give it, one for each source."""

    tokens_per_second: float
    trees: tuple[Tree, ...]


def ceiling(batch: int, sources: Sequence[Source], target: Seconds, largest: float, overhead: float) -> Ceiling:
    """The fastest step over all trees of drafts, a tree for each source:

        batch * (1 + sum(share * taken)) / (target(batch * (1 + sum(share * nodes))) + drafting + overhead)

    Everything in it flatters the step: a tree has the drafts of the largest reach (their own odds times those of coming
    to the depth before by any draft at all), a draft model computes one token a row and depth, nothing but forwards
    takes longer than without drafts, the batch is always full. What it does not know is that an engine may give rows
    of which it is surer larger trees than others: such an engine could pass it.

    Args:
        batch: rows of a step. At least 1.
        target: seconds of the target's forward; it is asked about up to `largest` tokens, which is what was measured.
        overhead: seconds of a step outside the forward, without drafts.

    Returns:
        the ceiling; without drafts where nothing is gained by them.
    """
    paid = [at for at, source in enumerate(sources) if source.draft is not None]
    free = _surest_first(sources)
    best = Ceiling(0.0, ())
    for bought in product(*(list(sources[at].trees(MOST_NODES)) for at in paid)):
        trees = [Tree(0, 0, 0.0)] * len(sources)
        for at, tree in zip(paid, bought, strict=True):
            trees[at] = tree
        shares = [(sources[at].share, tree) for at, tree in zip(paid, bought, strict=True)]
        nodes, taken = (sum(share * getattr(tree, name) for share, tree in shares) for name in ("nodes", "taken"))
        drafting = sum(sources[at].draft(batch * sources[at].share) * trees[at].depth for at in paid)
        for reach, depth, at in [(0.0, 0, None), *free]:
            if at is not None:
                before = trees[at]
                trees[at] = Tree(max(before.depth, depth), before.nodes + 1, before.taken + reach)
                nodes, taken = nodes + sources[at].share, taken + sources[at].share * reach
            tokens = batch * (1 + nodes)
            if tokens > max(largest, batch):
                break
            rate = batch * (1 + taken) / (target(tokens) + drafting + overhead)
            if rate > best.tokens_per_second:
                best = Ceiling(rate, tuple(trees))
    return best


def _surest_first(sources: Sequence[Source]) -> list[tuple[float, int, int]]:
    """Drafts that cost nothing to make, as their reach, depth and source: whatever a step can take, it takes these."""
    cells = [
        (reach, depth, at) for at, source in enumerate(sources) if not source.draft for reach, depth in source.cells()
    ]
    return sorted(cells, key=lambda cell: (-cell[0], cell[1]))
