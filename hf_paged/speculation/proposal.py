"""What a proposer hands over, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_paged.plan import Span

MOST_NODES = 62  # with the token that they follow they fit the bits of `TreeMask.visible`


@dataclass(frozen=True)
class Proposal:
    """Draft tokens behind the last token of a row: a tree, of which a chain is the plainest.

    Attributes:
        tokens: token ids, parents before their children.
        parents: for each the index of the token that it follows, -1 for the row's last token.
        kinds: for each what its proposer knows of how sure it is, a small number: see `Acceptance`.
        odds: for each an estimate that the target takes it, once it has taken its parent.
        source: name of the proposer.
        origin: for each its index where the proposer made it (drafts that do not pay were taken out since).
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    kinds: tuple[int, ...]
    odds: tuple[float, ...]
    source: str
    origin: tuple[int, ...] = ()
    _chain: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_chain", self.parents == tuple(range(-1, len(self.tokens) - 1)))
        if not self.origin:
            object.__setattr__(self, "origin", tuple(range(len(self.tokens))))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no two tokens follow the same one."""
        return self._chain

    def depths(self) -> list[int]:
        """For each token how many stand between it and the row's last token, itself included."""
        if self._chain:
            return list(range(1, len(self.tokens) + 1))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def reach(self) -> list[float]:
        """For each token an estimate that the target comes by it."""
        reach: list[float] = []
        for parent, odds in zip(self.parents, self.odds, strict=True):
            reach.append(odds if parent < 0 else reach[parent] * odds)
        return reach

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` (-1: of the row's last token) that is `token`."""
        if self._chain:
            after = node + 1
            return after if after < len(self.tokens) and self.tokens[after] == token else None
        for index in range(node + 1, len(self.tokens)):
            if self.parents[index] == node and self.tokens[index] == token:
                return index
        return None

    def pick(self, chosen: Sequence[int]) -> Proposal:
        """The same with only some of its tokens, in this order, parents before children."""
        place = {-1: -1} | {index: at for at, index in enumerate(chosen)}
        return Proposal(
            tuple(self.tokens[i] for i in chosen),
            tuple(place[self.parents[i]] for i in chosen),
            tuple(self.kinds[i] for i in chosen),
            tuple(self.odds[i] for i in chosen),
            self.source,
            tuple(self.origin[i] for i in chosen),
        )

    def only(self, chosen: set[int]) -> Proposal:
        """The same with only these of its tokens, the likeliest path first: where it is taken, its KV lies in place."""
        if self._chain:
            return self if len(chosen) == len(self) else self.pick(sorted(chosen))
        children: dict[int, list[int]] = {}
        for index in sorted(chosen):
            children.setdefault(self.parents[index], []).append(index)
        order, stack = [], [-1]
        while stack:
            node = stack.pop()
            if node >= 0:
                order.append(node)
            stack += sorted(children.get(node, ()), key=lambda index: self.odds[index])
        return self.pick(order)

    def span(self, last: int, computed: int) -> Span:
        """What the target computes: `last`, the row's last token, at place `computed`, and the drafts behind it."""
        tokens = (last, *self.tokens)
        if self._chain:
            return Span(tokens, computed, computed)
        return Span(tokens, computed, computed, *tree_places(self.parents, computed))


def tree_places(parents: Sequence[int], computed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of a token at place `computed` and of the tree behind it, and what they see (see `TreeMask`)."""
    positions, visible = [computed], [1]
    for index, parent in enumerate(parents):
        positions.append(positions[parent + 1] + 1)
        visible.append(visible[parent + 1] | 2 << index)
    return tuple(positions), tuple(visible)


@dataclass(frozen=True)
class Verdict:
    """What the target made of a proposal.

    Attributes:
        proposal: the drafts.
        path: indices of those it took, one behind another. Exactly one token more was drawn, unless the row ended.
        ended: whether the row ended, so that what stands behind the path was not looked at.
    """

    proposal: Proposal
    path: tuple[int, ...]
    ended: bool = False

    @property
    def accepted(self) -> int:
        """Drafts that the target took."""
        return len(self.path)

    @property
    def deepest(self) -> int:
        """Depth down to which it was looked for drafts to take."""
        return self.accepted + (not self.ended)

    def judged(self) -> list[tuple[int, bool]]:
        """The drafts that were put to the test, and whether each was taken: the children of every token of the path."""
        if self.proposal.is_chain:
            judged = min(self.deepest, len(self.proposal))
            return [(index, index < self.accepted) for index in range(judged)]
        taken, out = set(self.path), []
        tested = {-1, *self.path}
        if self.ended:
            tested.discard(self.path[-1] if self.path else -1)
        for index, parent in enumerate(self.proposal.parents):
            if parent in tested:
                out.append((index, index in taken))
        return out

    def ranks(self) -> list[int]:
        """For each draft of the path, how many of its depth were likelier."""
        proposal = self.proposal
        if proposal.is_chain:
            return [0] * len(self.path)
        depths, reach = proposal.depths(), proposal.reach()
        beside: dict[int, list[float]] = {}
        for depth, odds in zip(depths, reach, strict=True):
            beside.setdefault(depth, []).append(odds)
        return [sum(odds > reach[node] for odds in beside[depths[node]]) for node in self.path]
