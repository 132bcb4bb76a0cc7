"""Index tensors that let one decode read pages in place. Computed once a step, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.kernels.fp8 import selected
from hf_paged.kernels.rows import PagedRows


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows of like length, whose scores are laid side by side for the softmax.

    Attributes:
        rows: how many.
        width: pages of the longest.
        pages: int64 `[rows * width]`, which selected page; any where a row is shorter.
        bias: float `[rows, 1, width * page_size]`, 0 where a slot is seen and -inf elsewhere.
    """

    rows: int
    width: int
    pages: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class DecodeIndex:
    """How pages map to rows and back.

    Attributes:
        first, last: the span of the pool that is read in place, or None where pages are gathered by `gather`.
        gather: int64 `[pages]`, or None.
        owner: int64 `[pages]`, row of each selected page (any, for one that no row of the step reads).
        groups: see `RowGroup`; their cells, one after another, are what `back` points into.
        back: int64 `[pages]`, cell of each selected page.
        order: int64, the selected pages of row 0, then row 1, and so on.
        starts: int64 `[rows]`, where each row begins in `order`.
    """

    first: int | None
    last: int | None
    gather: torch.Tensor | None
    owner: torch.Tensor
    groups: tuple[RowGroup, ...]
    back: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor

    def select(self, pages: torch.Tensor) -> torch.Tensor:
        """The pages to read, without a copy where they are one span."""
        if self.gather is None:
            return pages[self.first : self.last]
        return selected(pages, self.gather)

    def sum(self, parts: torch.Tensor) -> torch.Tensor:
        """Sum `[pages, n]` over the pages of each row: `[rows, n]`. (A bag sum is much faster than `index_add_`.)"""
        if parts.dtype == torch.float32:
            return torch.embedding_bag(parts, self.order, self.starts, False, 0)[0]
        rows = torch.zeros(len(self.starts), parts.shape[1], device=parts.device)
        owner = self.owner.index_select(0, self.order)
        return rows.index_add_(0, owner, parts.index_select(0, self.order).float()).to(parts.dtype)


def build_decode_index(rows: PagedRows, window: int | None, device: torch.device) -> DecodeIndex:
    """Index tensors for the first `rows.num_decodes` rows."""
    n, size = rows.num_decodes, rows.page_size
    context = rows.context_lens[:n]
    begin = np.zeros_like(context) if window is None else np.maximum(context - window, 0)
    first_page = begin // size
    counts = -(-context // size) - first_page
    owner = np.repeat(np.arange(n), counts)
    starts = np.cumsum(counts) - counts
    column = np.arange(len(owner)) - starts[owner]
    pages = rows.page_table[owner, column + first_page[owner]]
    low, high = int(pages.min()), int(pages.max()) + 1
    in_place = high - low <= 1.5 * len(pages) + 8 and len(np.unique(pages)) == len(pages)
    order = pages - low if in_place else np.arange(len(pages))
    total = high - low if in_place else len(pages)
    groups, cells = _groups(rows, counts, first_page, begin, order, starts, device)

    def spread(values: np.ndarray) -> torch.Tensor:
        out = np.zeros(total, np.int64)
        out[order] = values
        return torch.from_numpy(out).to(device)

    return DecodeIndex(
        first=low if in_place else None,
        last=high if in_place else None,
        gather=None if in_place else torch.from_numpy(pages).to(device),
        owner=spread(owner),
        groups=groups,
        back=spread(cells[owner] + column),
        order=torch.from_numpy(order).to(device),
        starts=torch.from_numpy(starts).to(device),
    )


def _groups(rows, counts, first_page, begin, order, starts, device) -> tuple[tuple[RowGroup, ...], np.ndarray]:
    """Row groups, and for each row the cell of its first page."""
    n, size = len(counts), rows.page_size
    widest = int(counts.max())
    # Rows of one group are padded to its longest: split by powers of two where that would more than double the work.
    level = np.zeros(n, np.int64) if n * widest <= 2 * counts.sum() + 64 else np.ceil(np.log2(counts)).astype(np.int64)
    groups, cells, offset = [], np.zeros(n, np.int64), 0
    for value in np.unique(level):
        members = np.flatnonzero(level == value)
        width = int(counts[members].max())
        column = np.arange(width)
        inside = column < counts[members, None]
        table = np.where(inside, starts[members, None] + column, 0)
        position = (first_page[members, None] * size + np.arange(width * size))[:, None]
        seen = (position < rows.context_lens[members, None, None]) & (position >= begin[members, None, None])
        bias = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))).to(device)
        groups.append(RowGroup(len(members), width, torch.from_numpy(order[table].reshape(-1)).to(device), bias))
        cells[members] = offset + np.arange(len(members)) * width
        offset += len(members) * width
    return tuple(groups), cells
