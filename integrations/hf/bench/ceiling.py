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

    def trees(self, most: int) -> Iterator[Tree]:
        """For every depth and number of drafts up to `most` the tree that is taken furthest; first of all, none."""
        yield Tree(0, 0, 0.0)
        cells: list[tuple[float, int]] = []
        reach = 1.0
        for depth, odds in enumerate(self.odds, 1):
            cells += [(reach * one, depth) for one in odds]
            reach *= sum(odds)
            best = sorted((cell[0] for cell in cells), reverse=True)
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
    best = Ceiling(0.0, ())
    for trees in product(*(list(source.trees(MOST_NODES)) for source in sources)):
        chosen = list(zip(sources, trees, strict=True))
        tokens = batch * (1 + sum(source.share * tree.nodes for source, tree in chosen))
        if tokens > max(largest, batch):
            continue
        drafting = sum(
            tree.depth * source.draft(batch * source.share) for source, tree in chosen if source.draft is not None
        )
        made = batch * (1 + sum(source.share * tree.taken for source, tree in chosen))
        rate = made / (target(tokens) + drafting + overhead)
        if rate > best.tokens_per_second:
            best = Ceiling(rate, trees)
    return best
