"""Layers of a `PagedCache`: KV in pages, given back dense."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_paged.integrations.cache_tables import PageTables, SlotIndex
from hf_paged.memory import PageCopy
from hf_paged.store import lazy_zeros


class PagedStates:
    """Keys, or values, of one layer, in pages.

    Args:
        like: states `[rows, *heads, tokens, dim]` that give shape, dtype and device.
        page_size: tokens a page.
        capacity: pages beside page 0.
    """

    def __init__(self, like: torch.Tensor, page_size: int, capacity: int) -> None:
        self.heads, self.page_size, self.dim = like.shape[1:-2], page_size, like.shape[-1]
        self.num_heads = self.heads.numel()
        self.slots = self._zeros(capacity, like.dtype, like.device)  # `[pages * heads * page_size, dim]`

    def _zeros(self, capacity: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            return lazy_zeros(((capacity + 1) * self.num_heads * self.page_size, self.dim), dtype, device)

    @property
    def capacity(self) -> int:
        """Pages beside page 0."""
        return len(self.slots) // (self.num_heads * self.page_size) - 1

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_heads * self.page_size * self.dim * self.slots.itemsize

    def resize(self, capacity: int, dtype: torch.dtype | None = None) -> None:
        """Make room for `capacity` pages, keeping what is stored, as `dtype` (default: as before)."""
        old = self.slots
        self.slots = self._zeros(capacity, dtype or old.dtype, old.device)
        kept = min(len(old), len(self.slots))
        self.slots[:kept].copy_(old[:kept])

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy whole pages.

        Args:
            source, target: int64 `[pages]`.
        """
        pages = self.slots.view(self.capacity + 1, self.num_heads, self.page_size, self.dim)
        pages.index_copy_(0, target, pages.index_select(0, source))

    def write(self, states: torch.Tensor, index: SlotIndex) -> None:
        """Store states `[rows, *heads, tokens, dim]` in the slots to write."""
        if states.dtype != self.slots.dtype:  # joining tensors promotes them, and so does the default cache
            self.resize(self.capacity, torch.promote_types(states.dtype, self.slots.dtype))
            states = states.to(self.slots.dtype)
        self.slots.index_copy_(0, index.places(self.num_heads, index.start), states.detach().reshape(-1, self.dim))

    def read(self, index: SlotIndex, first: int) -> torch.Tensor:
        """Slots from `first` on as `[rows, *heads, slots, dim]`."""
        found = self.slots.index_select(0, index.places(self.num_heads, first))
        return found.view(len(index.table), *self.heads, index.stop - first, self.dim)


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer, in pages.

    Args:
        tables: page tables, shared by all layers of the cache.
        window: of a layer with a sliding window (or chunks of that size). Everything is stored, so that `crop` works
            anywhere, and what the default cache would give back is given back: `window - 1` tokens beside the new.
    """

    is_croppable = True

    def __init__(self, tables: PageTables, window: int | None = None) -> None:
        # Not the base's: `keys` and `values` are computed here.
        self.tables = tables
        self.is_sliding, self.sliding_window = window is not None, window
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
            keys and values `[rows, *heads, seen, dim]`: all, or those in the window. Gradients flow to the new states,
            not to older ones.
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
        first = self._first_seen(start)
        keys, values = (stored.read(index, first) for stored in self._states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            past = start - first
            keys, values = (torch.cat([a[..., :past, :], b], -2) for a, b in ((keys, new[0]), (values, new[1])))
        return keys, values

    def _first_seen(self, length: int) -> int:
        """The first slot that tokens after `length` tokens may see."""
        return 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)

    def _dense(self, which: int) -> torch.Tensor | None:
        if self._states is None:
            return None
        return self._states[which].read(self.tables.slots(0, self.length, self._states[which].slots.device), 0)

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
        places = torch.tensor([(c.source, c.target) for c in copies], device=self._states[0].slots.device)
        for states in self._states:
            states.copy_pages(places[:, 0], places[:, 1])

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_seen(self.length)
        return self.length - first + query_length, first

    def get_max_length(self) -> int:
        return -1

    def forget(self) -> None:
        """Drop the tensors."""
        self.length, self.is_initialized, self._states = 0, False, None

    def check(self, length: int, capacity: int) -> None:
        """Verify that the layer fits the page tables."""
        if self.length > length:
            raise AssertionError(f"a layer stores {self.length} tokens, the page tables {length}")
        if any(states.capacity < capacity for states in self._states or ()):
            raise AssertionError(f"a layer does not hold {capacity} pages")

    def _refuse(self, *args, **kwargs) -> None:
        raise NotImplementedError("layers of a PagedCache share their page tables: call this method of the cache")

    # What changes page tables is the cache's to do, for all layers at once.
    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse
