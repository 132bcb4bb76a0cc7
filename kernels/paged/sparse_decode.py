"""Decode attention on a CPU as two sparse products over the slots that rows see, read where they lie.

Queries against keys is a sampled dense product (SDDMM): a sparse matrix has a row for each (row, head) and a column for
each slot; only the slots of the row's own pages are computed, and the mask is what the product is added to. Weights
against values is a weighted bag sum of slots. No page is copied, whatever the page table, and nothing is padded but
rows of like length, to the longest of them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from hf_paged.kernels.rows import PagedRows

# Rows join a group while they have at least this share of the pages of its longest.
ALIKE = 0.8


@dataclass(frozen=True, eq=False)
class SlotGroup:
    """Rows `first` to `last`, each with `width` slots.

    Attributes:
        slots: int32 or int64 `[rows * heads * width]`, line of each slot in a layer seen as `[lines, dim]`.
        offsets: same dtype `[rows * heads + 1]`, where each (row, head) begins in `slots`.
        bias: float32 `[rows * heads * width]`, 0 where a slot is seen and -inf elsewhere.
    """

    first: int
    last: int
    width: int
    slots: torch.Tensor
    offsets: torch.Tensor
    bias: torch.Tensor


def sparse_decode(query, key_pages, value_pages, rows: PagedRows, scale, window, softcap, sinks) -> torch.Tensor:
    """One query a row, float32 on a CPU. `[rows, heads, dim]` → `[rows, heads, value_dim]`."""
    heads, kv_heads = query.shape[1], key_pages.shape[1]
    groups = rows.derived(
        ("slots", window, heads, kv_heads), lambda: build_slot_groups(rows, window, heads, kv_heads, key_pages.shape[0])
    )
    keys, values = key_pages.view(-1, key_pages.shape[-1]).t(), value_pages.view(-1, value_pages.shape[-1])
    parts = [_attend(query, keys, values, group, scale, softcap, sinks) for group in groups]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(len(query), heads, -1)


def _attend(query, keys, values, group: SlotGroup, scale, softcap, sinks) -> torch.Tensor:
    lines = query[group.first : group.last].reshape(-1, query.shape[-1])
    size = (len(lines), keys.shape[1])
    if softcap is None:
        mask = _pattern(group, group.bias, size)
        scores = torch.sparse.sampled_addmm(mask, lines, keys, alpha=scale).values()
    else:
        empty = _pattern(group, torch.zeros_like(group.bias), size)
        scores = torch.sparse.sampled_addmm(empty, lines, keys, alpha=scale / softcap).values()
        scores = scores.tanh_().mul_(softcap).add_(group.bias)
    scores = scores.view(len(lines), group.width)
    if sinks is not None:
        sink = sinks.to(scores.dtype).repeat(group.last - group.first)[:, None]
        weights = torch.cat([scores, sink], -1).softmax(-1)[:, :-1].contiguous()
    else:
        weights = scores.softmax(-1)
    return torch.embedding_bag(values, group.slots, group.offsets, False, 0, False, weights.view(-1), True)[0]


def _pattern(group: SlotGroup, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.sparse_csr_tensor(group.offsets, group.slots, values, size, check_invariants=False)


def build_slot_groups(
    rows: PagedRows, window: int | None, heads: int, kv_heads: int, num_pages: int
) -> tuple[SlotGroup, ...]:
    """Groups of neighbouring rows of like length; once a step, for all layers of the same window and heads."""
    n, size = rows.num_decodes, rows.page_size
    context = rows.context_lens[:n]
    begin = np.zeros_like(context) if window is None else np.maximum(context - window, 0)
    first_page = begin // size
    counts = -(-context // size) - first_page
    dtype = np.int32 if num_pages * kv_heads * size < 2**31 else np.int64
    head = np.arange(heads) // (heads // kv_heads)
    groups = []
    for first, last in _alike(counts.tolist()):
        width = int(counts[first:last].max())
        # Behind its last page a shorter row repeats it, masked: it is sure to hold finite numbers.
        column = first_page[first:last, None] + np.minimum(np.arange(width), counts[first:last, None] - 1)
        pages = rows.page_table[np.arange(first, last)[:, None], column]
        lines = (pages[:, None] * kv_heads + head[:, None]) * size  # [rows, heads, width]
        slots = (lines[..., None] + np.arange(size)).astype(dtype)
        position = first_page[first:last, None] * size + np.arange(width * size)
        seen = (position < context[first:last, None]) & (position >= begin[first:last, None])
        bias = np.where(seen, np.float32(0), np.float32(-np.inf))
        offsets = np.arange(0, slots.size + 1, width * size, dtype=dtype)
        groups.append(
            SlotGroup(
                first=first,
                last=last,
                width=width * size,
                slots=torch.from_numpy(slots.reshape(-1)),
                offsets=torch.from_numpy(offsets),
                bias=torch.from_numpy(np.repeat(bias, heads, axis=0).reshape(-1)),
            )
        )
    return tuple(groups)


def _alike(counts: list[int]) -> list[tuple[int, int]]:
    """Neighbouring rows of like page counts, as ranges; one range where padding would cost little."""
    longest = max(counts)
    if longest * len(counts) <= sum(counts) / ALIKE + 64:
        return [(0, len(counts))]
    ranges, first, low, high = [], 0, counts[0], counts[0]
    for i, count in enumerate(counts):
        low, high = min(low, count), max(high, count)
        if low < ALIKE * high:
            ranges.append((first, i))
            first, low, high = i, count, count
    return [*ranges, (first, len(counts))]


@lru_cache(maxsize=1)
def is_supported() -> bool:
    """Whether this build of torch has the sparse product on a CPU, and it is right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that sparse CSR tensors are in beta
            mask = torch.sparse_csr_tensor(
                torch.tensor([0, 1, 3], dtype=torch.int32),
                torch.tensor([1, 0, 2], dtype=torch.int32),
                torch.tensor([0.0, 0.0, -torch.inf]),
                (2, 3),
                check_invariants=False,
            )
        query, keys = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.5, 1.0], [2.0, 2.0]])
        found = torch.sparse.sampled_addmm(mask, query, keys.t(), alpha=2.0).values()
        return bool(torch.equal(found, torch.tensor([5.0, 6.0, -torch.inf])))
    except (RuntimeError, AttributeError):
        return False
