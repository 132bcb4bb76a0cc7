"""The hottest prefixes of a radix tree, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_paged.radix import Node, RadixTree


@dataclass(frozen=True)
class PrefixLine:
    """A stretch of the tree between two branchings.

    Attributes:
        tokens: from the root to its end.
        own: of these, those of this stretch.
        uses: matches that ended in it or below.
        below: tokens of all that follows it.
        salt: under which it stands.
        text: its last tokens, decoded or as ids.
    """

    tokens: int
    own: int
    uses: int
    below: int
    salt: str | None
    text: str


@dataclass(frozen=True)
class TreeSummary:
    """The tree in short; printing it shows a table.

    Attributes:
        nodes: pages. tokens: tokens stored. lines: the hottest stretches, most used first.
    """

    nodes: int
    tokens: int
    lines: tuple[PrefixLine, ...]

    def __str__(self) -> str:
        out = [f"{self.tokens} tokens on {self.nodes} pages"]
        if self.lines:
            out.append(f"{'uses':>6} {'tokens':>7} {'own':>6} {'below':>7}  prefix")
        for line in self.lines:
            salt = f"[{line.salt}] " if line.salt is not None else ""
            out.append(f"{line.uses:>6} {line.tokens:>7} {line.own:>6} {line.below:>7}  {salt}{line.text}")
        return "\n".join(out)

    __repr__ = __str__


def summarise(tree: RadixTree, decode: Callable[[list[int]], str] | None, limit: int, width: int = 60) -> TreeSummary:
    """The `limit` stretches that were used most.

    Args:
        decode: token ids → text; None shows ids.
        width: characters of text a line.
    """
    found = []
    for root in tree.roots():
        below, uses = _sums(root)
        for first, last in (stretch for child in root.children for stretch in _stretches(child)):
            found.append((uses[first], last, root.salt, below[last]))
    found.sort(key=lambda entry: -entry[0])
    lines = [_line(*entry, decode, width) for entry in found[:limit]]
    return TreeSummary(tree.nodes, tree.tokens, tuple(lines))


def _sums(root: Node) -> tuple[dict[Node, int], dict[Node, int]]:
    """For each node the tokens below it, and the matches that ended at it or below."""
    order, stack = [], list(root.children)
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(node.children)
    below, uses = {}, {}
    for node in reversed(order):
        below[node] = sum(below[child] + len(child.tokens) for child in node.children)
        uses[node] = node.hits + sum(uses[child] for child in node.children)
    return below, uses


def _stretches(node: Node) -> list[tuple[Node, Node]]:
    """The first and the last node of every stretch from `node` down: it ends where it branches, or is a leaf."""
    out, stack = [], [node]
    while stack:
        first = last = stack.pop()
        while len(last.children) == 1:
            last = last.children[0]
        out.append((first, last))
        stack.extend(last.children)
    return out


def _line(uses: int, node: Node, salt, below: int, decode, width: int) -> PrefixLine:
    path = node.path()
    tokens, own = sum(len(n.tokens) for n in path), len(node.tokens)
    for parent in reversed(path[:-1]):
        if len(parent.children) > 1:
            break
        own += len(parent.tokens)
    ids = [token for n in path for token in n.tokens][-width:]
    text = repr(decode(ids))[1:-1] if decode is not None else " ".join(map(str, ids))
    return PrefixLine(tokens, own, uses, below, salt, text if len(text) <= width else "…" + text[-width:])
