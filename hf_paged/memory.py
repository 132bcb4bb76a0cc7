"""Who holds which page: the only writer of page tables.

Paged KV storage after Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023. Nothing here touches a tensor: a copy of a page is a value that the caller carries out in its store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hf_paged.pages import OutOfPages, PagePool
from hf_paged.prefix_cache import Found, PrefixCache
from hf_paged.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PageCopy:
    """KV of page `source` must be copied to page `target` before the next write.

    Its first `valid` slots: what lies behind them is another sequence's, and may hold anything.
    """

    source: int
    target: int
    valid: int


class Memory:
    """Page tables of all sequences over one pool.

    Args:
        num_pages: pages in the pool.
        page_size: tokens a page.
        prefix_caching: keep pages after their sequences, for others that begin with the same tokens.

    Attributes:
        prefixes: what is kept, or None.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = False) -> None:
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.prefixes = PrefixCache(self.pool, page_size) if prefix_caching else None
        self._sequences: set[Sequence] = set()

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill."""
        return -(-tokens // self.page_size)

    @property
    def sequences(self) -> set[Sequence]:
        """All open sequences."""
        return self._sequences

    @property
    def available(self) -> int:
        """Pages that sequences can have now: free ones, and those that only the prefix cache holds."""
        return self.pool.free + self.pool.idle

    @property
    def live_tokens(self) -> int:
        """Slots that hold a token's KV for a sequence (those of a page that several share count once)."""
        pool, size = self.pool, self.page_size
        live = pool.held * size
        for s in self._sequences:  # all pages of a sequence are full but the last ones
            empty = len(s.pages) * size - s.computed
            if empty:
                if empty >= size or pool.sequences(s.pages[-1]) > 1:
                    return self._count_live()
                live -= empty
        return live

    def _count_live(self) -> int:
        filled: Counter[int] = Counter()
        for s in self._sequences:
            for i, page in enumerate(s.pages):
                filled[page] = max(filled[page], min(max(s.computed - i * self.page_size, 0), self.page_size))
        return filled.total()

    def find(self, tokens: list[int], salt: Hashable = None) -> Found | None:
        """What a sequence over `tokens` would find in the prefix cache; None without one. Changes nothing."""
        return self.prefixes.find(tokens, salt) if self.prefixes is not None else None

    def open(
        self, tokens: list[int], shared: bool = False, salt: Hashable = None, found: Found | None = None
    ) -> Sequence:
        """A sequence over `tokens` (kept, not copied) that holds no page yet, but those that it shares.

        Args:
            shared: whether its pages may serve others that begin with the same tokens and have the same `salt`.
            found: what `find` says of it now: it begins with these pages.
        """
        sequence = Sequence(tokens)
        self._sequences.add(sequence)
        if shared and self.prefixes is not None:
            sequence.shared, sequence.salt = True, salt
            if found is not None:
                sequence.pages = list(found.pages)
                for page in found.pages:
                    self.pool.share(page)
                sequence.computed, sequence.found = found.length, found.node.depth
                if found.length:
                    found.node.hits += 1
            behind = found.node if sequence.found else self.prefixes.tree.root(salt)
            self.prefixes.enter(sequence, behind)
        return sequence

    def needed(self, sequence: Sequence, count: int) -> int:
        """Pages that `reserve(sequence, count)` would take from the pool."""
        if count == 1 and (index := sequence.computed // self.page_size) < len(sequence.pages):
            return int(self.pool.count(sequence.pages[index]) > 1)
        fresh = self.pages_for(sequence.computed + count) - len(sequence.pages)
        return max(fresh, 0) + len(self._shared(sequence, sequence.computed, count))

    def _shared(self, sequence: Sequence, start: int, count: int) -> list[int]:
        """Indices of pages that `count` tokens from `start` on are written to and that others hold too."""
        if count == 0:
            return []
        first, last = start // self.page_size, self.pages_for(start + count)
        pages = sequence.pages
        return [i for i in range(first, min(last, len(pages))) if self.pool.count(pages[i]) > 1]

    def reserve(self, sequence: Sequence, count: int, start: int | None = None) -> list[PageCopy]:
        """Make `count` slots of `sequence` writable.

        Takes pages as needed. A page that is to be written and that others hold too is replaced by a copy.

        Args:
            start: the first of the slots, at most `sequence.computed`, which is the default. Less rewrites stored KV.
        Returns:
            the copies to carry out before anything is written.
        Raises:
            OutOfPages: the pool cannot give enough; nothing was changed.
            ValueError: the sequence is closed, `count` is negative, or `start` lies beyond its stored KV.
        """
        self._require_open(sequence)
        start = sequence.computed if start is None else start
        if count < 0 or not 0 <= start <= sequence.computed:
            raise ValueError(f"count={count}, start={start}: must be at least 0, and 0 to {sequence.computed}")
        shared = self._shared(sequence, start, count)
        fresh = max(self.pages_for(start + count) - len(sequence.pages), 0)
        if not fresh and not shared:
            return []
        taken = self._take(fresh + len(shared))
        copies = []
        for index, page in zip(shared, taken, strict=False):
            source = sequence.pages[index]
            sequence.pages[index] = page
            self.pool.release(source)
            valid = min(sequence.computed - index * self.page_size, self.page_size)
            if valid > 0:
                copies.append(PageCopy(source, page, valid))
        sequence.pages.extend(taken[len(shared) :])
        return copies

    def _take(self, n: int) -> list[int]:
        """Pages from the pool; the prefix cache makes room where that is enough."""
        missing = n - self.pool.free
        if 0 < missing <= self.pool.idle:
            self.prefixes.evict(missing)
        return self.pool.take(n)

    @contextmanager
    def borrowed(self) -> Iterator[list[int]]:
        """A list for pages taken from the pool: they are released at the end, whatever happens."""
        pages: list[int] = []
        try:
            yield pages
        finally:
            for page in pages:
                self.pool.release(page)

    def commit(self, sequence: Sequence, count: int) -> None:
        """Note that KV of the next `count` tokens is stored."""
        end = sequence.computed + count
        if count < 0 or end > len(sequence.tokens) or end > len(sequence.pages) * self.page_size:
            raise ValueError(
                f"count={count} cannot be committed: {sequence.computed} of {len(sequence.tokens)} tokens are "
                f"computed, {len(sequence.pages)} pages of {self.page_size} are reserved"
            )
        sequence.computed = end
        if sequence.node is not None:
            self.prefixes.extend(sequence)

    def take_replaced(self) -> list[int]:
        """Free pages that `commit` gave up for others since the last call; they may hold anything."""
        if self.prefixes is None or not self.prefixes.replaced:
            return []
        replaced, self.prefixes.replaced = self.prefixes.replaced, []
        return [page for page in replaced if not self.pool.count(page)]

    def rollback(self, sequence: Sequence, length: int) -> None:
        """Forget stored KV from token `length` on and release the pages behind it. Copies nothing."""
        self._require_open(sequence)
        if not 0 <= length <= sequence.computed:
            raise ValueError(f"length={length} is not allowed: 0 to {sequence.computed}")
        sequence.computed = length
        if sequence.node is not None:
            self.prefixes.step_back(sequence)
        keep = self.pages_for(length)
        for page in reversed(sequence.pages[keep:]):
            self.pool.release(page)
        del sequence.pages[keep:]

    def fork(self, sequence: Sequence, tokens: list[int] | None = None) -> Sequence:
        """A new sequence that shares the pages of all computed tokens; the first to write a shared tail page copies it.

        Args:
            tokens: its tokens, which must begin with the computed ones. Default: a copy of the parent's.
        """
        self._require_open(sequence)
        if tokens is not None and tokens[: sequence.computed] != sequence.tokens[: sequence.computed]:
            raise ValueError(f"tokens must begin with the {sequence.computed} computed ones of the parent")
        child = self.open(list(sequence.tokens) if tokens is None else tokens)
        child.pages = sequence.pages[: self.pages_for(sequence.computed)]
        for page in child.pages:
            self.pool.share(page)
        child.computed = sequence.computed
        if sequence.node is not None:
            child.shared, child.salt, child.found = True, sequence.salt, sequence.node.depth
            self.prefixes.enter(child, sequence.node)
        return child

    def close(self, sequence: Sequence, keep: bool = True) -> list[int]:
        """Release all pages. Closing twice is allowed.

        Args:
            keep: whether its KV is good: the prefix cache may keep it, or must forget what this sequence computed.
        Returns:
            the pages that are free now.
        """
        if sequence.node is not None:
            if keep:
                self.prefixes.end(sequence)
            else:
                self.prefixes.discard(sequence)
        pages, sequence.pages = sequence.pages, []
        sequence.computed, sequence.open = 0, False
        self._sequences.discard(sequence)
        for page in pages:
            self.pool.release(page)
        return [page for page in pages if not self.pool.count(page)]

    def repair(self, sequences: set[Sequence], doubt: bool = False) -> None:
        """Keep just `sequences` and make the pool agree with their tables, after an interrupt inside a method.

        Args:
            doubt: a sequence that is not among them may have left KV in the prefix cache that is not good.
        """
        self._sequences = {s for s in sequences if s is not None and s.open}
        for s in self._sequences:
            s.computed = min(s.computed, len(s.pages) * self.page_size)
        kept = []
        if self.prefixes is not None:
            self.prefixes.repair(self._sequences, doubt)
            kept = [node.page for node in self.prefixes.tree]
        self.pool.rebuild(Counter(page for s in self._sequences for page in s.pages), kept)

    def forget(self) -> None:
        """Empty the prefix cache. What open sequences have computed will not be shared either."""
        if self.prefixes is not None:
            self.prefixes.forget()

    def waste(self) -> float:
        """Share of the slots of sequences' pages that hold no live token, 0 to 1."""
        total = self.pool.held * self.page_size
        return 1 - self.live_tokens / total if total else 0.0

    def check(self) -> None:
        """Verify every law of pages and sequences.

        Raises:
            AssertionError: one does not hold.
        """
        holders = Counter(page for s in self._sequences for page in s.pages)
        kept = []
        if self.prefixes is not None:
            self.prefixes.check(self._sequences)
            kept = [node.page for node in self.prefixes.tree]
        self.pool.check(dict(holders), kept)
        for s in self._sequences:
            if not s.open:
                raise AssertionError("a closed sequence is still known")
            if not 0 <= s.computed <= len(s.tokens):
                raise AssertionError(f"computed {s.computed} of {len(s.tokens)} tokens")
            if s.computed > len(s.pages) * self.page_size:
                raise AssertionError(f"{s.computed} tokens do not fit {len(s.pages)} pages")
            if len(set(s.pages)) != len(s.pages):
                raise AssertionError(f"a page stands twice in one table: {s.pages}")

    def _require_open(self, sequence: Sequence) -> None:
        if not sequence.open:
            raise ValueError("the sequence is closed")


__all__ = ["Memory", "OutOfPages", "PageCopy"]
