"""The obvious paged attention: one row, one head at a time. Slow; the oracle of every other path."""

from __future__ import annotations

import torch

from hf_paged.kernels.rows import PagedRows


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
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(heads):
                keys = torch.stack([key_pages[p, head // groups, s] for p, s in where[first : last + 1]]).double()
                values = torch.stack([value_pages[p, head // groups, s] for p, s in where[first : last + 1]]).double()
                scores = keys @ query[start + i, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(keys)]
                out[start + i, head] = (weights @ values).to(query.dtype)
        start += length
    return out
