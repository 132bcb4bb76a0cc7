"""Which leaf of a radix tree is given up next: the one least likely to pay for its page.

How likely a prefix is to return is learned from what is seen: by how long ago it was used (in uses of the tree), how
often its text has returned before (the turns of a conversation), and how much its last use added. The rate of returns
by age, times a factor for each of the other two, as in Cox's proportional hazards; and of a leaf of some age and kind,
the most returns for the time it is kept, over all times one may keep it: the index of Gittins, "Bandit Processes and
Dynamic Allocation Indices", 1979. Rates by class and age, and age in uses, are those of Beckmann, Chen and Cidon, "LHD:
Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018. Before anything is learned: least recently used first.

What was given up is remembered for a while by a hash, so that rates at ages beyond what is kept are learned too; a
collision costs a wrong count and nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hf_paged.radix import Node

# Ages are counted in bins that begin here, each half as long again as the one before.
EDGES = [0, *(int(16 * 1.5**i) for i in range(28))]
BINS = len(EDGES)
TURNS, SIZES = 4, 12  # kinds: returns so far, and powers of two of pages added
RENEW = 128  # uses between two looks at the rates, at least
HALVE = 1 << 14  # uses after which what was seen counts half
PRIOR = 30.0  # returns that a kind must have seen at an age for its own rate to count half
STALE = 4  # entries of a heap that may be out of date, over leaves, before it is made anew


class Use:
    """The latest use of some nodes: a request that began with them, or added them.

    Attributes:
        time: the queue's clock.
        turn: times that its text had returned before.
        size: power of two of the pages that it added.
        depth: pages of its whole text.
        open: whether it can be seen to return still.
        seen: age up to which it has been counted.
    """

    __slots__ = ("time", "turn", "size", "depth", "open", "seen")

    def __init__(self, time: int, turn: int, size: int, depth: int) -> None:
        self.time, self.turn, self.size, self.depth = time, turn, size, depth
        self.open, self.seen = True, 0


class Rates:
    """Returns and time at risk, by kind and age."""

    def __init__(self) -> None:
        self.returns = np.zeros((TURNS, SIZES, BINS))
        self.at_risk = np.zeros((TURNS, SIZES, BINS))
        self.whole = self.parts = 0.0  # returns that reached the last page of what returned, and all
        self.renew()

    def expose(self, use: Use, age: int) -> None:
        """`use` did not return until `age`."""
        at, risk = bisect_right(EDGES, use.seen) - 1, self.at_risk[use.turn, use.size]
        while use.seen < age:
            end = min(age, EDGES[at + 1]) if at + 1 < BINS else age
            risk[at] += end - use.seen
            use.seen = end
            at += 1

    def note(self, use: Use, age: int, whole: bool) -> None:
        """`use` returned at `age`; `whole`: with its last page."""
        self.expose(use, age)
        self.returns[use.turn, use.size, bisect_right(EDGES, age) - 1] += 1
        self.parts += 1
        self.whole += whole

    def halve(self) -> None:
        """Let what was seen so far count less than what comes."""
        for counts in (self.returns, self.at_risk):
            counts *= 0.5
        self.whole *= 0.5
        self.parts *= 0.5

    def renew(self) -> None:
        """Indices `[turn, size, bin]` from what was seen."""
        at_risk, returns = self.at_risk, self.returns
        base = _base(returns.sum((0, 1)), at_risk.sum((0, 1)))
        expected = at_risk * base
        turn = _factor(returns.sum(1), expected.sum(1))
        size = _factor(returns.sum(0), (expected * turn[:, None]).sum(0))
        rate = base * turn[:, None] * size[None]
        self.index = _gittins(rate).tolist()
        self.tail = (self.whole + 4.0) / (self.parts + 4.0)


def _base(returns: np.ndarray, at_risk: np.ndarray) -> np.ndarray:
    """Returns a use at each age; where little was seen, what was seen at lower ages, falling as one over the age."""
    rate, before = np.empty(BINS), (returns.sum() + 1) / (at_risk.sum() + 1e4)
    for i in range(BINS):
        if i > 1:
            before *= EDGES[i - 1] / EDGES[i]
        rate[i] = before = (returns[i] + 1) / (at_risk[i] + 1 / before)
    return rate


def _factor(returns: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How much more often each kind returned than expected, at each age. `[kinds, bins]`, both and the result."""
    over_all_ages = (returns.sum(1, keepdims=True) + PRIOR) / (expected.sum(1, keepdims=True) + PRIOR)
    return (returns + PRIOR * over_all_ages) / (expected + PRIOR)


def _gittins(rate: np.ndarray) -> np.ndarray:
    """For each kind and age the most returns for the time kept. Rates a use `[..., bins]`; never rises with age."""
    length = np.diff(EDGES, append=4 * EDGES[-1])
    gone = 1 - np.exp(-rate * length)
    index = np.zeros_like(rate)
    for begin in range(BINS):
        stays, hits, time = np.ones(rate.shape[:-1]), 0.0, 0.0
        for at in range(begin, BINS):
            hits = hits + stays * gone[..., at]
            time = time + stays * gone[..., at] / rate[..., at]
            stays = stays * (1 - gone[..., at])
            np.maximum(index[..., begin], hits / time, out=index[..., begin])
    return np.maximum.accumulate(index[..., ::-1], axis=-1)[..., ::-1]


class EvictionQueue:
    """Leaves of a tree, and which of them goes next.

    Args:
        learn: False: least recently used first.
    """

    def __init__(self, learn: bool = True) -> None:
        self.learn, self.clock = learn, 0
        self.rates = Rates()
        self.leaves = 0  # in heaps, entries that are out of date included
        self._heaps: dict[tuple[int, int, bool], list] = {}
        self._pushed = 0
        self._open: list[Use] = []
        self._gone: OrderedDict[int, Use] = OrderedDict()  # uses whose nodes were given up, by the hash of a node
        self._renewed = self._halved = 0
        self._last: Use | None = None
        self._next: Node | None = None

    def use(self, node: Node) -> None:
        """The prefix that ends at `node` was used: by a request that ended."""
        self.clock += 1
        path = []
        known = node
        while known.parent is not None and known.use is None:
            path.append(known)
            known = known.parent
        turn = self._return(known, path) if self.learn else 0
        use = Use(self.clock, min(turn, TURNS - 1), min(len(path).bit_length(), SIZES - 1), node.depth)
        at = node
        while at.parent is not None:
            at.use = use
            at = at.parent
        if not node.children:
            self.push(node)
        if self.learn:
            self._open.append(use)
            if self.clock - self._renewed >= max(RENEW, len(self._open) // 8):
                self._renew()

    def _return(self, known: Node, path: list[Node]) -> int:
        """Note whose text has returned, if any has: more than half of it. Returns how often it has by now."""
        before, depth = known.use, known.depth
        if known.parent is None or 2 * depth <= before.depth:
            found = next((n for n in path if n.key in self._gone), None)
            if found is None:
                return 0
            before, depth = self._gone.pop(found.key), found.depth
        if before.open:
            self.rates.note(before, self.clock - before.time, depth >= before.depth)
            before.open = False
        return before.turn + 1

    def push(self, leaf: Node, bared: bool = False) -> None:
        """`leaf` may be given up. `bared`: since the node below it was, just now."""
        use = leaf.use
        self._pushed += 1
        kind = (use.turn, use.size, leaf.depth == use.depth) if self.learn else (0, 0, False)
        heappush(self._heaps.setdefault(kind, []), (use.time, self._pushed, leaf, use))
        self.leaves += 1
        # As likely to be used as the one below it was: no other is less so, until another one comes.
        self._next = leaf if bared and use is self._last and not kind[2] else None

    def pop(self) -> Node | None:
        """The leaf to give up next; None: there is none. Whoever keeps it pushes it again."""
        node, self._next = self._next, None
        if node is not None and not node.gone and not node.children and node.use is self._last:
            return node
        best, chosen = None, None
        for kind, heap in list(self._heaps.items()):
            entry = self._head(kind, heap)
            if entry is not None:
                rank = (self._index(kind, self.clock - entry[0]), entry[0])
                if best is None or rank < best:
                    best, chosen = rank, heap
        if chosen is None:
            return None
        _, _, node, use = heappop(chosen)
        self._last = use if node.depth < use.depth or not self.learn else None
        self.leaves -= 1
        return node

    def _head(self, kind: tuple[int, int, bool], heap: list) -> tuple | None:
        """The entry of a heap that was used longest ago and is up to date."""
        while heap and _out_of_date(heap[0]):
            heappop(heap)
            self.leaves -= 1
        if not heap:
            del self._heaps[kind]
            return None
        return heap[0]

    def _index(self, kind: tuple[int, int, bool], age: int) -> float:
        if not self.learn:
            return 0.0
        index = self.rates.index[kind[0]][kind[1]][bisect_right(EDGES, age) - 1]
        return index * self.rates.tail if kind[2] else index

    def removed(self, node: Node, nodes: int) -> None:
        """`node` was given up, and `nodes` are left."""
        use = node.use
        if self.learn and use is not None and use.open and node.depth == use.depth // 2 + 1:
            self._gone[node.key] = use  # whoever passes here again has more than half of it
            while len(self._gone) > max(256, nodes):
                _, old = self._gone.popitem(last=False)
                self.rates.expose(old, self.clock - old.time)
                old.open = False
        if self.leaves > STALE * nodes + 64:
            self._compact()

    def _compact(self) -> None:
        self._heaps = {kind: [e for e in heap if not _out_of_date(e)] for kind, heap in self._heaps.items()}
        for heap in self._heaps.values():
            heapify(heap)
        self.leaves = sum(map(len, self._heaps.values()))

    def _renew(self) -> None:
        self._renewed = self.clock
        self._open = [use for use in self._open if use.open]
        for use in self._open:
            self.rates.expose(use, self.clock - use.time)
        if self.clock - self._halved >= HALVE:
            self._halved = self.clock
            self.rates.halve()
        self.rates.renew()

    def queued(self) -> set[Node]:
        """Leaves that `pop` would give, in no order."""
        return {entry[2] for heap in self._heaps.values() for entry in heap if not _out_of_date(entry)}


def _out_of_date(entry: tuple) -> bool:
    _, _, node, use = entry
    return node.gone or bool(node.children) or node.use is not use
