"""Scatter of new keys and values into their slots."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_paged.kernels.fp8 import narrowed, raw
from hf_paged.kernels.rows import PagedRows


def _positions(rows: PagedRows, heads: int) -> torch.Tensor:
    """Where each token and head lies in a layer seen as `[num_pages * kv_heads * page_size, head_dim]`."""
    page, offset = rows.slots // rows.page_size, rows.slots % rows.page_size
    head = torch.arange(heads, device=page.device)
    return ((page[:, None] * heads + head) * rows.page_size + offset[:, None]).view(-1)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, rows: PagedRows
) -> None:
    """See `hf_paged.kernels.write_kv`."""
    if not rows.vouched and bool((kept := rows.slots >= 0).logical_not().any()):
        key, value = key[kept], value[kept]
        rows = replace(rows, slots=rows.slots[kept], _derived={})
    heads = key_pages.shape[1]
    index = rows.derived(("write", heads), lambda: _positions(rows, heads))
    for new, pages in ((key, key_pages), (value, value_pages)):
        dim = pages.shape[-1]
        new = narrowed(new.reshape(-1, dim), pages.dtype)
        raw(pages).view(-1, dim).index_copy_(0, index, raw(new))
