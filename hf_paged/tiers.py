"""Where evicted pages may go, and whether it pays to fetch them: what tiers in host memory and on disk have in common.

A tier knows pages by the tokens from position 0 through the page's end, and by a salt. It may hold a page whose parent
it does not hold: that one may still be in the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from hf_paged.kernels.fp8 import raw
from hf_paged.store import KVStore

STAGE_BYTES = 32 << 20  # pages that are copied into the store at once
WEIGHT = 0.25  # of the latest fetch in the average
PATIENCE = 256  # pages that are computed because loading seemed slower, before loading is tried again
MOST_PATIENCE = 1 << 16


class Speed:
    """Whether to load pages or to compute them, by how long earlier loads took.

    The first load is always tried. While computing seems faster, loading is tried again now and then, since the first
    load may have found cold caches; each time that it is slower still, the next try comes twice as late.

    Attributes:
        seconds_per_page: average over earlier loads, later ones counting more; None before the first.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.seconds_per_page: float | None = None
        self._refused, self._patience = 0, PATIENCE

    def note(self, pages: int, seconds: float) -> None:
        """`pages` pages were loaded in `seconds`."""
        if pages > 0:
            latest, before = seconds / pages, self.seconds_per_page
            self.seconds_per_page = latest if before is None else before + WEIGHT * (latest - before)

    def worth(self, pages: int, compute_tokens_per_s: float | None) -> bool:
        """Whether to load `pages` pages. To be asked once for each load that is possible: refusals are counted.

        Args:
            compute_tokens_per_s: how fast their tokens are computed instead; None or 0 while nobody knows.
        """
        if pages < 1:
            return False
        if self.seconds_per_page is None or not compute_tokens_per_s:
            return True
        if self.seconds_per_page * compute_tokens_per_s < self.page_size:
            self._refused, self._patience = 0, PATIENCE
            return True
        self._refused += pages
        if self._refused <= self._patience:
            return False
        self._refused, self._patience = 0, min(2 * self._patience, MOST_PATIENCE)
        return True


class Tier(ABC):
    """Pages outside the pool. Not thread-safe.

    Args:
        store: whose pages it takes and gives back.
        max_bytes: what it may hold, at least a page.

    Attributes:
        speed: how fast it is.
        pages, bytes: what it holds.
        puts: pages that were copied into it.
        hits: pages that were fetched from it.
        evictions: pages that it gave up to keep its limit.
        damaged: pages that it lost because their bytes were not those that it was given.
    """

    def __init__(self, store: KVStore, max_bytes: int) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < store.bytes_per_page:
            raise ValueError(
                f"max_bytes={max_bytes!r} is not allowed: an int of at least a page, {store.bytes_per_page}"
            )
        self.store, self.max_bytes, self.page_size = store, max_bytes, store.page_size
        self.speed = Speed(store.page_size)
        self.pages = self.bytes = self.puts = self.hits = self.evictions = self.damaged = 0

    @abstractmethod
    def put(self, tokens: Sequence[int], salt: str | None, page: int) -> bool:
        """Copy the KV of `page` out of the store.

        Args:
            tokens: those from position 0 through the end of the page, a multiple of `page_size`.
            salt: whose they are: nobody with another salt will find them.
        Returns:
            whether the tier has the page now.
        Raises:
            ValueError: `tokens` do not end with a page.
        """

    @abstractmethod
    def clear(self, identity: str | None = None) -> None:
        """Forget everything: the weights have changed.

        Args:
            identity: what the KV of the new weights is known by, where it matters (`DiskTier`).
        """

    @abstractmethod
    def _locate(self, tokens: Sequence[int], salt: str | None, first: int, end: int) -> list[Any]:
        """Consecutive pages of a path that are here, from page index `first` up to `end`."""

    @abstractmethod
    def _load(self, found: Any) -> torch.Tensor | None:
        """The KV of a page that `_locate` found: a row as of `page_row`, on the CPU. None: it is lost."""

    @abstractmethod
    def _touch(self, found: Any) -> None:
        """A page that `_locate` found is used."""

    def count(self, tokens: Sequence[int], salt: str | None, first: int) -> int:
        """Consecutive full pages of `tokens` that are here, from page index `first` on. Changes nothing.

        A caller that needs the logits of the last token leaves it out.
        """
        return len(self._locate(tokens, salt, first, len(tokens) // self.page_size))

    def fetch(self, tokens: Sequence[int], salt: str | None, first: int, pages: Sequence[int]) -> int:
        """Copy KV of consecutive pages of `tokens`, from page index `first` on, into `pages` of the store.

        They stay in the tier too: giving them up again costs nothing.

        Returns:
            how many could be had; the pages behind them are as they were.
        """
        start, done = perf_counter(), 0
        end = min(first + len(pages), len(tokens) // self.page_size)
        found = self._locate(tokens, salt, first, end)
        group = max(1, STAGE_BYTES // self.store.bytes_per_page)
        while done < len(found):
            rows = self._rows(found[done : done + group])
            write_rows(self.store, pages[done : done + len(rows)], rows)
            done += len(rows)
            if len(rows) < group:
                break
        if self.store.keys[0].device.type == "cuda":
            torch.cuda.current_stream(self.store.keys[0].device).synchronize()
        self.speed.note(done, perf_counter() - start)
        for each in reversed(found[:done]):  # the first of a path are the last to go: the others need them
            self._touch(each)
        self.hits += done
        return done

    def worth(self, pages: int, compute_tokens_per_s: float | None) -> bool:
        """Whether fetching `pages` pages seems faster than computing them, see `Speed.worth`."""
        return self.speed.worth(pages, compute_tokens_per_s)

    def _rows(self, found: list[Any]) -> list[torch.Tensor]:
        rows = []
        for each in found:
            row = self._load(each)
            if row is None:
                break
            rows.append(row)
        return rows

    def _require_path(self, tokens: Sequence[int]) -> None:
        if not tokens or len(tokens) % self.page_size:
            raise ValueError(f"{len(tokens)} tokens are not allowed: a multiple of {self.page_size}, from it on")


def row_elements(store: KVStore) -> int:
    """Numbers in a row of `page_row`."""
    return sum(shape.elements for shape in store.layers) * store.page_size


def page_row(store: KVStore, page: int) -> torch.Tensor:
    """KV of a page as one row `[elements]` on the store's device: keys of all layers, then values of all layers."""
    return torch.cat([raw(tensor)[page].flatten() for tensor in (*store.keys, *store.values)]).view(store.dtype)


def write_rows(store: KVStore, pages: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
    """Copy rows of `page_row`, of any device, into pages of the store."""
    if not rows:
        return
    device = store.keys[0].device
    staged = torch.empty((len(rows), row_elements(store)), dtype=store.dtype, device=device)
    for target, row in zip(staged, rows, strict=True):
        target.copy_(row, non_blocking=True)
    index, at = torch.tensor(pages, device=device), 0
    for tensor in (*store.keys, *store.values):
        size = tensor[0].numel()
        raw(tensor).index_copy_(0, index, raw(staged)[:, at : at + size].view(len(rows), *tensor.shape[1:]))
        at += size
