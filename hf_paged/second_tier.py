"""Between the prefix cache and tiers outside the pool: what leaves the one goes to the others, and comes back."""

from __future__ import annotations

from collections.abc import Sequence as Many

from hf_paged.memory import Memory, OutOfPages
from hf_paged.radix import Node
from hf_paged.sequence import Sequence
from hf_paged.store import KVStore
from hf_paged.tiers import Tier


class SecondTier:
    """Keeps evicted pages in `tiers`, the fastest first, and brings them back for sequences that begin with them.

    Args:
        memory: with a prefix cache.
        tiers: host memory, a directory, or both.
    """

    def __init__(self, memory: Memory, store: KVStore, tiers: Many[Tier]) -> None:
        self.memory, self.store, self.tiers = memory, store, list(tiers)
        if self.tiers:
            memory.prefixes.leaving = self._leave

    def _leave(self, node: Node) -> None:
        """A page is about to be given up. One that is not full is cheap to compute again."""
        if len(node.tokens) == self.memory.page_size:
            tokens = [token for each in node.path() for token in each.tokens]
            for tier in self.tiers:
                tier.put(tokens, node.salt, node.page)

    def restore(self, sequence: Sequence, tokens_per_second: float | None, most: int) -> int:
        """Bring back pages behind those that a sequence, just opened, has found; where that seems faster.

        Args:
            tokens_per_second: how fast tokens are computed; None: not known yet.
            most: tokens that it may begin with.
        Returns:
            tokens whose KV came back.
        """
        before, size = sequence.computed, self.memory.page_size
        for tier in self.tiers:
            first = sequence.computed // size
            path = sequence.tokens[: most // size * size]
            count = tier.count(path, sequence.salt, first)
            if not count or not tier.worth(count, tokens_per_second):
                continue
            try:
                self.store.copy(self.memory.reserve(sequence, (first + count) * size - sequence.computed))
            except OutOfPages:
                break
            done = tier.fetch(path, sequence.salt, first, sequence.pages[first : first + count])
            self.memory.commit(sequence, max((first + done) * size - sequence.computed, 0))
        return sequence.computed - before

    def forget(self, identity: str) -> None:
        """The model is another one: nothing that was kept is valid, but files that are known by its `identity`."""
        for tier in self.tiers:
            tier.clear(identity)
