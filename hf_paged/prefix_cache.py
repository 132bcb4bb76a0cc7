"""Pages of prefixes that may come again: a radix tree over pages of the pool, and which sequences run where in it.

A sequence takes part from `enter` on. Its full pages are those of the tree, from the root to its node; what it computes
behind them is its own until a page is full. Its tail can be shared all the same, while it runs: sequences are known at
the node where their tail begins.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from hf_paged.pages import PagePool
from hf_paged.radix import Node, RadixTree
from hf_paged.sequence import Sequence

if TYPE_CHECKING:
    from hf_paged.prefix_files import PrefixPage


@dataclass(frozen=True)
class Found:
    """KV that is there for some tokens.

    Attributes:
        length: tokens, at most all but the last.
        pages: pages that hold them; the last may hold more, and is copied before it is written.
        node: the last node all of whose page is shared; a root where there is none.
    """

    length: int
    pages: list[int]
    node: Node = field(repr=False)

    def whole_pages(self) -> Found:
        """The same without a page that only part of is shared."""
        depth = self.node.depth
        return Found(depth * len(self.node.tokens), self.pages[:depth], self.node)


class PrefixCache:
    """Holds pages of the pool for as long as nobody else needs them.

    Attributes:
        tree: what is known.
        evictions: pages given up to make room, since the start.
        replaced: pages that sequences gave up for the tree's with the same tokens. What is in them is not known to be
            good: who takes this list wipes them before they are used again.
        leaving: called with the node and its page before an idle page is given up, while its KV is still there.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.tree = RadixTree(page_size)
        self.evictions = 0
        self.replaced: list[int] = []
        self.leaving: Callable[[Node], None] | None = None
        self._changing = False  # True in the middle of a change, and after an exception in there

    def find(self, tokens: list[int], salt: Hashable = None) -> Found:
        """The longest prefix whose KV is in the tree or in the tail of a running sequence. Changes nothing."""
        match = self.tree.match(tokens, salt)
        begin, limit = match.node.depth * self.page_size, len(tokens) - 1
        length, pages = match.length, match.pages
        for sequence in match.node.tails or ():
            end = min(sequence.computed, begin + self.page_size, limit)
            if end > length:
                common = begin + common_length(sequence.tokens, tokens, begin, end)
                if common > length:
                    length, pages = common, [*match.pages[: match.node.depth], sequence.pages[match.node.depth]]
        return Found(length, pages, match.node)

    def enter(self, sequence: Sequence, node: Node) -> None:
        """`sequence` goes on behind `node`, whose path its first pages are."""
        sequence.node = node
        if node.tails is None:
            node.tails = set()
        node.tails.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        """`sequence` takes no part any more."""
        node, sequence.node = sequence.node, None
        if node is not None and node.tails is not None:
            node.tails.discard(sequence)

    def step_back(self, sequence: Sequence) -> None:
        """Fewer tokens of `sequence` are computed than its node stands for: it goes on behind an ancestor."""
        node = sequence.node
        while node.depth * self.page_size > sequence.computed:
            node = node.parent
        if node is not sequence.node:
            self.tree.touch(sequence.node)
            self.leave(sequence)
            self.enter(sequence, node)

    def extend(self, sequence: Sequence) -> None:
        """Add the pages that `sequence` has filled. Where their tokens are known, the tree's pages replace its own."""
        size, node = self.page_size, sequence.node
        end = sequence.computed // size
        if node.depth >= end:
            return
        self._changing = True
        self.leave(sequence)
        while node.depth < end:
            at = node.depth
            node = self._add(node, sequence.tokens[at * size : (at + 1) * size], sequence.pages[at])
            if node.page != sequence.pages[at]:
                self.pool.share(node.page)
                self.pool.release(sequence.pages[at])
                self.replaced.append(sequence.pages[at])
                sequence.pages[at] = node.page
        self.enter(sequence, node)
        self._changing = False

    def end(self, sequence: Sequence) -> None:
        """Add the tail of `sequence`, which computes no more, and note that its whole path was used."""
        self.extend(sequence)  # after an interrupt its node may lag behind
        self._changing = True
        node, at = sequence.node, sequence.node.depth
        if sequence.computed > at * self.page_size:
            node = self._add(node, sequence.tokens[at * self.page_size : sequence.computed], sequence.pages[at])
        self.tree.touch(node)
        self.leave(sequence)
        self._changing = False

    def _add(self, node: Node, tokens: Many[int], page: int) -> Node:
        child, dropped = self.tree.extend(node, tuple(tokens), page)
        if dropped is not None:
            self.pool.drop(dropped)
        if child.page == page:
            self.pool.keep(page)
        return child

    def adopt(self, entries: Iterable[PrefixPage], pages: dict[int, int]) -> int:
        """Add pages that hold saved KV.

        Args:
            entries: parents first.
            pages: page of each entry that is to be added, by its number. Whoever took them releases them afterwards.
        Returns:
            tokens added.
        """
        self._changing = True
        nodes: list[Node | None] = []
        before = self.tree.tokens
        for number, entry in enumerate(entries):
            parent = self.tree.root(entry.salt) if entry.parent < 0 else nodes[entry.parent]
            if parent is not None and number in pages:
                nodes.append(self._add(parent, entry.tokens, pages[number]))
                self.tree.touch(nodes[-1])
            else:
                nodes.append(parent and self.tree.child(parent, entry.tokens))
        self._changing = False
        return self.tree.tokens - before

    def discard(self, sequence: Sequence) -> None:
        """Forget what `sequence` computed, and all that was computed behind it: it went wrong."""
        node = sequence.node
        self._changing = True
        if node.depth > sequence.found:
            while node.depth > sequence.found + 1:
                node = node.parent
            self._remove(node)
        self.leave(sequence)
        self._changing = False

    def _remove(self, node: Node) -> None:
        """Give up `node` and all below. Sequences that run there go on behind its parent: what they add may be good."""
        above = node.parent
        for gone in self.tree.remove(node):
            self.pool.drop(gone.page)
            for other in list(gone.tails or ()):
                other.found = min(other.found, above.depth)
                self.leave(other)
                self.enter(other, above)

    def evict(self, count: int) -> None:
        """Give up to `count` idle pages to the pool, those least likely to be used first."""
        self._changing = True
        for node in self.tree.evict(count, self._unused):
            if self.leaving is not None:
                self.leaving(node)
            self.pool.drop(node.page)
            self.evictions += 1
        self._changing = False

    def _unused(self, page: int) -> bool:
        return not self.pool.sequences(page)

    def forget(self) -> None:
        """Give up everything. Sequences that run take no part any more: what they have computed is not to be known."""
        self._changing = True
        for node in list(chain(self.tree.roots(), self.tree)):
            for sequence in list(node.tails or ()):
                self.leave(sequence)
                sequence.shared = False
        for node in self.tree.clear():
            self.pool.drop(node.page)
        self._changing = False

    def repair(self, sequences: set[Sequence], doubt: bool) -> None:
        """Know just `sequences`, after an interrupt at an unknown place. A tree that was being changed is forgotten.

        Args:
            doubt: forget it anyway.
        """
        self._changing |= doubt
        if self._changing:
            self.tree.clear()
        for node in chain(self.tree.roots(), self.tree):
            node.tails = None
        for sequence in sequences:
            if not sequence.shared:  # an interrupt may have come before it left its node
                sequence.node = None
                continue
            if self._changing or sequence.node is None:
                sequence.node, sequence.found = self.tree.root(sequence.salt), 0
            self.enter(sequence, sequence.node)
            self.step_back(sequence)
        for node in list(self.tree):
            if node.use is None and not node.children:  # its sequence may be gone
                self.tree.touch(node)
        self._changing = False

    def check(self, sequences: set[Sequence]) -> None:
        """Verify that tree and sequences agree.

        Raises:
            AssertionError: they do not.
        """
        self.tree.check()
        if self._changing:
            raise AssertionError("a change of the tree was not finished")
        known = {s: node for node in chain(self.tree.roots(), self.tree) for s in node.tails or ()}
        if known != {s: s.node for s in sequences if s.node is not None}:
            raise AssertionError("a sequence is not known at its node, or at another")
        if any(n.use is None and not n.children and self._unused(n.page) for n in self.tree):
            raise AssertionError("an idle page cannot be evicted")
        for s, node in known.items():
            path = node.path()
            if [n.page for n in path] != s.pages[: len(path)]:
                raise AssertionError("the pages of a sequence are not those of its path")
            if [token for n in path for token in n.tokens] != s.tokens[: len(path) * self.page_size]:
                raise AssertionError("the tokens of a sequence are not those of its path")
            if node.depth * self.page_size > s.computed:
                raise AssertionError("a sequence stands behind what it has computed")


def common_length(a: list[int], b: list[int], begin: int, end: int) -> int:
    """Tokens that `a` and `b` have in common from `begin` on, before `end`."""
    end = min(end, len(a), len(b))
    if a[begin:end] == b[begin:end]:
        return max(end - begin, 0)
    return next(i for i in range(end - begin) if a[begin + i] != b[begin + i])
