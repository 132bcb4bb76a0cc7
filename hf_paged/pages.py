"""The pool of pages: a free list and reference counts. A page is an int; what it stores is not known here."""

from __future__ import annotations

from heapq import heappop, heappush


class OutOfPages(Exception):
    """The pool has too few free pages for what was asked. Nothing was changed."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} pages wanted, {free} free")
        self.wanted, self.free = wanted, free


class PagePool:
    """Hands out pages 1 to `num_pages`, lowest first, and counts their holders.

    Page 0 is never handed out: writes that must go nowhere go there. Lowest first keeps the pages in use close
    together, so that memory which was never needed is never touched, and attention can read one dense span.

    Args:
        num_pages: pages that can be handed out (at least 1).
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} is not allowed: at least 1")
        self.num_pages = num_pages
        self._freed: list[int] = []
        self._fresh = 1  # the lowest page that was never handed out
        self._count: dict[int, int] = {}
        self._shared = 0

    @property
    def free(self) -> int:
        """Pages that can be handed out now."""
        return self.num_pages - len(self._count)

    @property
    def used(self) -> int:
        """Pages that have a holder."""
        return len(self._count)

    @property
    def highest(self) -> int:
        """The highest page that was ever handed out (0: none)."""
        return self._fresh - 1

    @property
    def shared(self) -> int:
        """Pages that have several holders."""
        return self._shared

    def freed(self) -> list[int]:
        """Free pages that were handed out before."""
        return list(self._freed)

    def count(self, page: int) -> int:
        """Holders of `page` (0: free)."""
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
        return pages

    def share(self, page: int) -> None:
        """Add a holder to a page that has one."""
        if page not in self._count:
            raise ValueError(f"page {page} is free: it cannot be shared")
        self._shared += self._count[page] == 1
        self._count[page] += 1

    def release(self, page: int) -> None:
        """Take a holder from a page; without holders it is free."""
        count = self._count.get(page, 0)
        if count == 0:
            raise ValueError(f"page {page} is free: it cannot be released")
        if count > 1:
            self._count[page] = count - 1
            self._shared -= count == 2
            return
        del self._count[page]
        heappush(self._freed, page)

    def rebuild(self, holders: dict[int, int]) -> None:
        """Set the counts anew from `holders` (page → number of holders), after an interrupt at an unknown place."""
        self._count = dict(holders)
        self._shared = sum(count > 1 for count in holders.values())
        self._fresh = max(self._fresh, max(holders, default=0) + 1)
        self._freed = [page for page in range(1, self._fresh) if page not in holders]

    def check(self, holders: dict[int, int]) -> None:
        """Compare the counts with `holders` (page → number of holders, counted anew by the caller).

        Raises:
            AssertionError: a law does not hold.
        """
        if holders != self._count:
            raise AssertionError(f"page counts {self._count} differ from holders {holders}")
        if self._shared != sum(count > 1 for count in holders.values()):
            raise AssertionError(f"{self._shared} pages are counted as shared")
        known = set(self._count) | set(self._freed)
        if 0 in known or len(known) != len(self._count) + len(self._freed) or known != set(range(1, self._fresh)):
            raise AssertionError(f"free and used pages do not make up 1..{self._fresh - 1}")
        if self._fresh > self.num_pages + 1:
            raise AssertionError(f"page {self._fresh - 1} was handed out of {self.num_pages}")
