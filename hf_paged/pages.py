"""The pool of pages: a free list and reference counts. A page is an int; what it stores is not known here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush


class OutOfPages(Exception):
    """The pool has too few free pages for what was asked. Nothing was changed."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} pages wanted, {free} free")
        self.wanted, self.free = wanted, free


class PagePool:
    """Hands out pages 1 to `num_pages`, lowest first, and counts their holders: sequences, and a cache of prefixes.

    Page 0 is never handed out: writes that must go nowhere go there. Lowest first keeps the pages in use close
    together, so that memory which was never needed is never touched, and attention can read one dense span.

    Args:
        num_pages: pages that can be handed out (at least 1).

    Attributes:
        taken: called with pages that were just handed out, whatever they held before.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} is not allowed: at least 1")
        self.num_pages = num_pages
        self._freed: list[int] = []
        self._fresh = 1  # the lowest page that was never handed out
        self._count: dict[int, int] = {}  # sequences that hold a page
        self._kept: set[int] = set()  # pages that the cache holds
        self._idle = 0
        self.taken: Callable[[list[int]], None] | None = None

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return self.num_pages - self.used

    @property
    def idle(self) -> int:
        """Pages that only the cache holds: it gives them up when they are needed."""
        return self._idle

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return len(self._count)

    @property
    def used(self) -> int:
        """Pages that have a holder."""
        return len(self._count) + self._idle

    @property
    def highest(self) -> int:
        """The highest page that was ever handed out (0: none)."""
        return self._fresh - 1

    def freed(self) -> list[int]:
        """Free pages that were handed out before."""
        return list(self._freed)

    def count(self, page: int) -> int:
        """Holders of `page` (0: free)."""
        return self._count.get(page, 0) + (page in self._kept)

    def sequences(self, page: int) -> int:
        """Sequences that hold `page`."""
        return self._count.get(page, 0)

    def take(self, n: int) -> list[int]:
        """Hand out `n` pages with one holder each.

        Raises:
            OutOfPages: fewer than `n` are free; none was taken.
        """
        if n > self.free:
            raise OutOfPages(n, self.free)
        pages = []
        for _ in range(n):
            if self._freed:
                page = heappop(self._freed)
            else:
                page = self._fresh
                self._fresh += 1
            self._count[page] = 1
            pages.append(page)
        if self.taken is not None and pages:
            self.taken(pages)
        return pages

    def share(self, page: int) -> None:
        """Add a sequence to the holders of a page that has one."""
        count = self._count.get(page, 0)
        if not count:
            if page not in self._kept:
                raise ValueError(f"page {page} is free: it cannot be shared")
            self._idle -= 1
        self._count[page] = count + 1

    def release(self, page: int) -> None:
        """Take a sequence from a page's holders; without holders it is free."""
        count = self._count.get(page, 0)
        if count == 0:
            raise ValueError(f"page {page} is free or idle: it cannot be released")
        if count > 1:
            self._count[page] = count - 1
            return
        del self._count[page]
        if page in self._kept:
            self._idle += 1
        else:
            heappush(self._freed, page)

    def keep(self, page: int) -> None:
        """The cache holds a page that a sequence holds (and perhaps it did already)."""
        if page not in self._count:
            raise ValueError(f"no sequence holds page {page}: it cannot be kept")
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """The cache gives a page up; without other holders it is free."""
        if page not in self._kept:
            raise ValueError(f"page {page} is not kept: it cannot be dropped")
        self._kept.discard(page)
        if page not in self._count:
            self._idle -= 1
            heappush(self._freed, page)

    def rebuild(self, holders: dict[int, int], kept: Iterable[int] = ()) -> None:
        """Set the counts anew, after an interrupt at an unknown place.

        Args:
            holders: page → number of sequences that hold it.
            kept: pages that the cache holds.
        """
        self._count, self._kept = dict(holders), set(kept)
        used = self._count.keys() | self._kept
        self._idle = len(used) - len(self._count)
        self._fresh = max(self._fresh, max(used, default=0) + 1)
        self._freed = [page for page in range(1, self._fresh) if page not in used]

    def check(self, holders: dict[int, int], kept: Iterable[int] = ()) -> None:
        """Compare the counts with `holders` (page → number of sequences) and `kept`, counted anew by the caller.

        Raises:
            AssertionError: a law does not hold.
        """
        if holders != self._count:
            raise AssertionError(f"page counts {self._count} differ from holders {holders}")
        if set(kept) != self._kept:
            raise AssertionError(f"pages {self._kept ^ set(kept)} are kept by the pool or by the cache alone")
        used = self._count.keys() | self._kept
        if self._idle != len(used) - len(self._count):
            raise AssertionError(f"{self._idle} pages are counted as idle")
        known = used | set(self._freed)
        if 0 in known or len(known) != len(used) + len(self._freed) or known != set(range(1, self._fresh)):
            raise AssertionError(f"free and used pages do not make up 1..{self._fresh - 1}")
        if self._fresh > self.num_pages + 1:
            raise AssertionError(f"page {self._fresh - 1} was handed out of {self.num_pages}")
