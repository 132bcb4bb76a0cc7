"""What rows need of the pool, and what waiting rows would find there: `decide` asks, nothing changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_paged.memory import Memory
from hf_paged.prefix_cache import Found, common_length
from hf_paged.request import Row

# A row may be overtaken by so many requests that came after it, for the sake of prefixes that are there already.
OVERTAKEN = 256


@dataclass(frozen=True)
class Prospect:
    """What a waiting row would begin with.

    Attributes:
        found: tokens whose KV is there already, and their pages; None: it shares nothing.
        fresh: pages that it must take from the pool for the rest of its tokens.
        idle: pages of what is found that no sequence holds: the pool could give them away until the row has them.
    """

    found: Found | None
    fresh: int
    idle: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """Tokens that it need not compute."""
        return self.found.length if self.found is not None else 0


class Supply:
    """What the pages of `memory` allow."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def needed(self, row: Row, count: int) -> int:
        """Pages that a running row must take to compute `count` more tokens."""
        return self.memory.needed(row.sequence, count)

    def freed(self, row: Row) -> int:
        """Pages that others could have once a running row gives up its own."""
        return sum(self.memory.pool.sequences(page) == 1 for page in row.sequence.pages)

    def prospect(self, row: Row) -> Prospect:
        """What a waiting row would begin with, were it admitted now."""
        memory = self.memory
        total = memory.pages_for(len(row.tokens))
        if not row.reuses or memory.prefixes is None:
            return Prospect(None, total)
        return self._of(memory.find(row.tokens[: row.reusable + 1], row.salt), total)

    def frugal(self, row: Row, prospect: Prospect) -> Prospect:
        """The same without a page that it would copy: while it does, it would hold one more than it needs."""
        return self._of(prospect.found.whole_pages(), self.memory.pages_for(len(row.tokens)))

    def _of(self, found: Found, total: int) -> Prospect:
        idle = tuple(page for page in found.pages if not self.memory.pool.sequences(page))
        return Prospect(found, total - found.length // self.memory.page_size, idle)


class InFlight:
    """Rows that are computing a prompt, by where their paths go on: what they compute others need not."""

    def __init__(self, rows: Iterable[Row], page_size: int) -> None:
        self.page_size = page_size
        self._rows: dict[Any, list[Row]] = {}
        for row in rows:
            if row.sequence.pending > 1 and row.sequence.node is not None:
                self.add(row, row.sequence.node)

    def add(self, row: Row, node: Any) -> None:
        """`row` begins to compute behind `node`."""
        self._rows.setdefault(node, []).append(row)

    def brings(self, row: Row, prospect: Prospect) -> bool:
        """Whether `row` had better wait: another computes a page or more of what it needs, or most of it."""
        last = row.reusable  # what lies behind is computed in any case, for its logits
        for other in self._rows.get(prospect.found.node, ()):
            begin = prospect.found.node.depth * self.page_size
            gain = begin + common_length(row.tokens, other.tokens, begin, last) - prospect.known
            if gain >= self.page_size or (gain > 0 and 2 * gain >= len(row.tokens) - prospect.known):
                return True
        return False


def longest_prefix_first(rows: list[tuple[Row, Prospect]], newest: int, page_size: int) -> list[tuple[Row, Prospect]]:
    """Waiting rows in the order in which they should be admitted: those that find most, but in order of arrival where
    they find little; within a priority, and no row too long (`OVERTAKEN`).

    After Zheng et al., "SGLang", NeurIPS 2024: it lets rows meet while their common prefix is in memory.

    Args:
        newest: number of the latest request that runs.
    """
    newest = max(newest, *(row.request.number for row, _ in rows))

    def key(entry: tuple[Row, Prospect]) -> tuple:
        row, prospect = entry
        known = prospect.known if prospect.known >= page_size else 0
        late = newest - row.request.number > OVERTAKEN
        return (row.request.params.priority, not late, 0 if late else -known, row.order)

    return sorted(rows, key=key)
