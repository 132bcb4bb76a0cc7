"""Layers of a `PagedCache`: KV in pages, given back dense, and the page tables that all layers share."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_paged.memory import Memory, OutOfPages, PageCopy
from hf_paged.sequence import Sequence
from hf_paged.store import lazy_zeros

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
        start, stop: the slots that a forward writes; it reads those from 0 to `stop`.
    """

    def __init__(self, table: torch.Tensor, page_size: int, start: int, stop: int) -> None:
        self.table, self.page_size, self.start, self.stop = table, page_size, start, stop
        self._read: dict[int, torch.Tensor] = {}
        self._write: dict[int, torch.Tensor] = {}

    def _slots(self, heads: int, start: int, stop: int) -> torch.Tensor:
        """Places of slots `start` to `stop`: int64 `[rows * heads * (stop - start)]`."""
        size = self.page_size
        first, last = start // size, -(-stop // size)
        head = torch.arange(heads, device=self.table.device)[:, None]
        pages = (self.table[:, None, first:last] * heads + head) * size
        places = pages[..., None] + torch.arange(size, device=self.table.device)
        places = places.view(len(self.table), heads, (last - first) * size)
        return places[..., start - first * size : stop - first * size].reshape(-1)

    def read(self, heads: int) -> torch.Tensor:
        """Places of all slots, in the order row, head, slot."""
        if heads not in self._read:
            self._read[heads] = self._slots(heads, 0, self.stop)
        return self._read[heads]

    def write(self, heads: int) -> torch.Tensor:
        """Places of the slots to write, in the order row, head, slot."""
        if heads not in self._write:
            self._write[heads] = self._slots(heads, self.start, self.stop)
        return self._write[heads]


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
        self.layers: list[PagedLayer] = []
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


class PagedStates:
    """Keys, or values, of one layer: a tensor `[pages + 1, heads, page_size, dim]`.

    Args:
        like: states `[rows, *heads, tokens, dim]` that give shape, dtype and device.
    """

    def __init__(self, like: torch.Tensor, page_size: int, capacity: int) -> None:
        self.heads = like.shape[1:-2]
        self.pages = self._zeros((capacity + 1, self.heads.numel(), page_size, like.shape[-1]), like.dtype, like.device)

    @staticmethod
    def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            return lazy_zeros(shape, dtype, device)

    @property
    def page_bytes(self) -> int:
        return self.pages[0].numel() * self.pages.itemsize

    def resize(self, capacity: int, dtype: torch.dtype | None = None) -> None:
        """Make room for pages 1 to `capacity`, keeping what is stored, as `dtype` (default: as before)."""
        old = self.pages
        kept = min(len(old), capacity + 1)
        self.pages = self._zeros((capacity + 1, *old.shape[1:]), dtype or old.dtype, old.device)
        self.pages[:kept].copy_(old[:kept])

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy whole pages."""
        self.pages.index_copy_(0, target, self.pages.index_select(0, source))

    def write(self, states: torch.Tensor, index: SlotIndex) -> None:
        """Store states `[rows, *heads, tokens, dim]` in the slots to write."""
        if states.dtype != self.pages.dtype:  # joining tensors promotes them, and so does the default cache
            self.resize(len(self.pages) - 1, torch.promote_types(states.dtype, self.pages.dtype))
        dim = self.pages.shape[-1]
        states = states.detach().to(self.pages.dtype).reshape(-1, dim)
        self.pages.view(-1, dim).index_copy_(0, index.write(self.pages.shape[1]), states)

    def read(self, index: SlotIndex) -> torch.Tensor:
        """All slots as `[rows, *heads, slots, dim]`."""
        dim = self.pages.shape[-1]
        found = self.pages.view(-1, dim).index_select(0, index.read(self.pages.shape[1]))
        return found.view(len(index.table), *self.heads, index.stop, dim)


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer, in pages. One with a sliding window stores everything: the mask does the rest.

    Args:
        tables: page tables, shared by all layers of the cache.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, tables: PageTables) -> None:
        # Not the base's: `keys` and `values` are computed here.
        self.tables = tables
        self.length = 0  # of this layer: during a forward, layers that were not reached yet lag behind
        self.is_initialized = False
        self._states: tuple[PagedStates, PagedStates] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the tensors, from the shape, dtype and device of the first states."""
        size, capacity = self.tables.page_size, self.tables.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        self._states = (PagedStates(key_states, size, capacity), PagedStates(value_states, size, capacity))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states and give back all, dense.

        Args:
            key_states, value_states: `[rows, *heads, tokens, dim]`; `dim` and heads of the two may differ.
        Returns:
            keys and values `[rows, *heads, length, dim]`. Gradients flow to the new states, not to older ones.
        Raises:
            CacheFull: the pages do not suffice.
        """
        start, stop = self.length, self.length + key_states.shape[-2]
        self.tables.reserve(len(key_states), start, stop)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        index = self.tables.index(key_states.device)
        for stored, states in zip(self._states, new, strict=True):
            stored.write(states, index)
        self.length = stop
        if start == 0:
            return new
        keys, values = (stored.read(index) for stored in self._states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys, values = (torch.cat([a[..., :start, :], b], -2) for a, b in ((keys, new[0]), (values, new[1])))
        return keys, values

    def _dense(self, which: int) -> torch.Tensor | None:
        if self._states is None:
            return None
        return self._states[which].read(self.tables.slots(0, self.length, self._states[which].pages.device))

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, dense: `[rows, *heads, length, dim]`. Computed at each use."""
        return self._dense(0)

    @property
    def values(self) -> torch.Tensor | None:
        """All values, dense: `[rows, *heads, length, dim]`. Computed at each use."""
        return self._dense(1)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this layer (0: not known yet)."""
        return sum(states.page_bytes for states in self._states or ())

    def resize(self, capacity: int) -> None:
        """Make room for pages 1 to `capacity`."""
        for states in self._states or ():
            states.resize(capacity)

    def copy_pages(self, copies: list[PageCopy]) -> None:
        """Carry out page copies."""
        if not copies or self._states is None:
            return
        places = torch.tensor([(c.source, c.target) for c in copies], device=self._states[0].pages.device)
        for states in self._states:
            states.copy_pages(places[:, 0], places[:, 1])

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def forget(self) -> None:
        """Drop the tensors."""
        self.length, self.is_initialized, self._states = 0, False, None

    def check(self, length: int, capacity: int) -> None:
        """Verify that the layer fits the page tables."""
        if self.length > length:
            raise AssertionError(f"a layer stores {self.length} tokens, the page tables {length}")
        if any(len(states.pages) != capacity + 1 for states in self._states or ()):
            raise AssertionError(f"a layer does not hold {capacity} pages")

    def _refuse(self, *args, **kwargs) -> None:
        raise NotImplementedError("layers of a PagedCache share their page tables: call this method of the cache")

    # What changes page tables is the cache's to do, for all layers at once.
    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse
