"""The obvious paged attention: one row, one head at a time. Slow; the oracle of every other path."""

from __future__ import annotations

import torch

from hf_paged.kernels.rows import ALL, PagedRows


def paged_attention(
    query, key_pages, value_pages, rows: PagedRows, *, scale, window=None, softcap=None, sinks=None, fresh=None
) -> torch.Tensor:
    """See `hf_paged.kernels.paged_attention`; computes in float64 and reads slots one by one."""
    tokens, heads, _ = query.shape
    groups = heads // key_pages.shape[1]
    out = torch.zeros(tokens, heads, value_pages.shape[-1], dtype=query.dtype)
    start = 0
    for row, (length, context) in enumerate(zip(rows.query_lens.tolist(), rows.context_lens.tolist(), strict=True)):
        pages = rows.page_table[row].tolist()
        where = [(pages[p // rows.page_size], p % rows.page_size) for p in range(context)]
        for i in range(length):
            last = context - length + i
            seen = [where[slot] for slot in _seen(rows, start + i, last, window)]
            for head in range(heads):
                keys = torch.stack([key_pages[p, head // groups, s] for p, s in seen]).double()
                values = torch.stack([value_pages[p, head // groups, s] for p, s in seen]).double()
                scores = keys @ query[start + i, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(keys)]
                out[start + i, head] = (weights @ values).to(query.dtype)
        start += length
    return out


def _seen(rows: PagedRows, query: int, last: int, window: int | None) -> list[int]:
    """Slots that a query sees, whose own slot is `last`."""
    tree, position = rows.tree, last
    slots = [(slot, slot) for slot in range(last + 1)]  # and their positions
    if tree is not None and tree.visible[query] != ALL:
        base, visible, position = int(tree.base[query]), int(tree.visible[query]), int(tree.positions[query])
        path = [base + bit for bit in range(63) if visible >> bit & 1]
        slots = slots[:base] + [(slot, base + depth) for depth, slot in enumerate(path)]
    return [slot for slot, place in slots if window is None or place > position - window]
