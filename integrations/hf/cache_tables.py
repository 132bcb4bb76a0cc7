"""Page tables of a batch in transformers' loop, and where its slots lie. Knows no model and no transformers."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_paged.memory import Memory, OutOfPages, PageCopy
from hf_paged.sequence import Sequence

UNLIMITED_PAGES = 2**31 - 1
GROWTH = 1.5  # a store that is full grows by half: little held in vain, each page moved a few times at most


class CacheFull(OutOfPages):
    """The pages of a `PagedCache` with `num_pages` do not suffice. Nothing was changed."""

    def __init__(self, wanted: int, memory: Memory, rows: int, length: int) -> None:
        super().__init__(wanted, memory.pool.free)
        self.args = (
            f"the paged cache is full: {rows} rows of {length} tokens need {wanted} more pages of "
            f"{memory.page_size} tokens, {memory.pool.free} of num_pages={memory.pool.num_pages} are free",
        )


class SlotIndex:
    """Where slots of all rows lie in a layer that is seen as `[pages * heads * page_size, dim]`.

    Args:
        table: int64 `[rows, pages]`, page of every `page_size` slots.
        start, stop: the slots that a forward writes.
    """

    def __init__(self, table: torch.Tensor, page_size: int, start: int, stop: int) -> None:
        self.table, self.page_size, self.start, self.stop = table, page_size, start, stop
        self._known: dict[tuple[int, int], torch.Tensor] = {}

    def _slots(self, heads: int, start: int, stop: int) -> torch.Tensor:
        """Places of slots `start` to `stop`: int64 `[rows * heads * (stop - start)]`."""
        size = self.page_size
        first, last = start // size, -(-stop // size)
        head = torch.arange(heads, device=self.table.device)[:, None]
        pages = (self.table[:, None, first:last] * heads + head) * size
        places = pages[..., None] + torch.arange(size, device=self.table.device)
        places = places.view(len(self.table), heads, (last - first) * size)
        return places[..., start - first * size : stop - first * size].reshape(-1)

    def places(self, heads: int, first: int) -> torch.Tensor:
        """Places of slots `first` to `stop`, in the order row, head, slot: int64 `[rows * heads * (stop - first)]`."""
        if (heads, first) not in self._known:
            self._known[heads, first] = self._slots(heads, first, self.stop)
        return self._known[heads, first]


class Storage(Protocol):
    """What keeps the KV of one layer."""

    length: int

    def resize(self, capacity: int) -> None: ...
    def copy_pages(self, copies: list[PageCopy]) -> None: ...
    def check(self, length: int, capacity: int) -> None: ...


class PageTables:
    """Page tables of a batch, one sequence a row, shared by all layers. All rows are as long as the longest one.

    Args:
        page_size: tokens a page.
        num_pages: limit over all rows, or None.
    """

    def __init__(self, page_size: int, num_pages: int | None) -> None:
        self.memory = Memory(UNLIMITED_PAGES if num_pages is None else num_pages, page_size)
        self.page_size = page_size
        self.rows: list[Sequence] = []
        self.layers: list[Storage] = []
        self.capacity = 0  # pages that the layers' tensors hold beside page 0
        self._tokens: list[int] = []  # a cache never learns its token ids: all rows share this list of -1
        self._span: tuple[int, int] | None = None  # the slots that the forward under way may write
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._indices: dict[torch.device, SlotIndex] = {}

    @property
    def length(self) -> int:
        """Slots of every row that hold something, in one layer at least."""
        return self.rows[0].computed if self.rows else 0

    def reserve(self, rows: int, start: int, stop: int) -> None:
        """Make slots `start` to `stop` of all rows writable, in all layers.

        Args:
            rows: batch size of what is to be written.
        Raises:
            CacheFull: nothing was changed.
            ValueError: `rows` is not the batch size of what is stored.
        """
        if self._span == (start, stop) and rows == len(self.rows):
            return
        if rows != len(self.rows):
            if any(layer.length for layer in self.layers):
                raise ValueError(f"a batch of {rows} rows cannot follow {len(self.rows)} rows of {self.length} tokens")
            self.select([])
            self.rows = [self.memory.open(self._tokens) for _ in range(rows)]
        self._take(start, stop)
        self._tokens.extend([-1] * (stop - len(self._tokens)))
        for row in self.rows:
            self.memory.commit(row, max(stop - row.computed, 0))
        self._span = (start, stop)
        self._indices.clear()

    def _take(self, start: int, stop: int) -> None:
        """Give every row pages of its own for slots `start` to `stop`."""
        needed = self._pages_needed(start, stop) if stop > start else 0
        if not needed:
            return
        pool = self.memory.pool
        if needed > pool.free:
            raise CacheFull(needed, self.memory, len(self.rows), stop)
        # Room first: nothing may fail between a page's change of hands and its copy.
        self._grow(max(pool.used + needed, pool.highest))
        copies = [copy for row in self.rows for copy in self.memory.reserve(row, stop - start, start)]
        self._tables.clear()
        for layer in self.layers:
            layer.copy_pages(copies)

    def _pages_needed(self, start: int, stop: int) -> int:
        """Pages that `_take` takes."""
        first, last = start // self.page_size, self.memory.pages_for(stop)
        count = self.memory.pool.count
        fresh, shared = 0, []
        for row in self.rows:
            fresh += max(last - len(row.pages), 0)
            shared += [page for page in row.pages[first:last] if count(page) > 1]
        # All holders of a shared page write it, at the same place: each takes a copy, but the last, which keeps it.
        return fresh + len(shared) - len(set(shared))

    def _grow(self, pages: int) -> None:
        """Make room in all layers for pages 1 to `pages` at least."""
        if pages > self.capacity:
            grown = min(max(pages, int(self.capacity * GROWTH)), self.memory.pool.num_pages)
            for layer in self.layers:
                layer.resize(grown)
            self.capacity = grown

    def index(self, device: torch.device) -> SlotIndex:
        """The slots reserved last, on `device`: built once a forward."""
        if device not in self._indices:
            self._indices[device] = self.slots(*self._span, device)
        return self._indices[device]

    def slots(self, start: int, stop: int, device: torch.device) -> SlotIndex:
        """Slots `start` to `stop` of all rows."""
        if device not in self._tables:
            self._tables[device] = torch.tensor([row.pages for row in self.rows], dtype=torch.long, device=device)
        return SlotIndex(self._tables[device], self.page_size, start, stop)

    def select(self, indices: list[int]) -> None:
        """Make row i what row `indices[i]` was. Rows made of one share its pages; one made into none is closed."""
        used: set[int] = set()
        rows = []
        for i in indices:
            rows.append(self.memory.fork(self.rows[i], self._tokens) if i in used else self.rows[i])
            used.add(i)
        for i, row in enumerate(self.rows):
            if i not in used:
                self.memory.close(row)
        self.rows = rows
        self._forget()

    def crop(self, length: int) -> None:
        """Keep `length` slots of every row and release the pages beyond."""
        if length < self.length:
            for row in self.rows:
                self.memory.rollback(row, length)
            del self._tokens[length:]
            self._forget()

    def clear(self) -> None:
        """Close all rows. What the layers' tensors hold is lost."""
        self.select([])
        self._tokens.clear()
        self.capacity = 0
        self.memory.pool.rebuild({})

    def _forget(self) -> None:
        self._span = None
        self._tables.clear()
        self._indices.clear()

    def check(self) -> None:
        """Verify the laws of pages, of sequences and of this batch.

        Raises:
            AssertionError: one does not hold.
        """
        self.memory.check()
        if set(self.rows) != self.memory.sequences or len(set(self.rows)) != len(self.rows):
            raise AssertionError("the rows are not the open sequences")
        if len({(row.computed, len(row.pages)) for row in self.rows}) > 1:
            raise AssertionError("rows differ in length")
        if any(page > self.capacity for row in self.rows for page in row.pages):
            raise AssertionError(f"a page lies beyond the capacity of {self.capacity} pages")
        for layer in self.layers:
            layer.check(self.length, self.capacity)
