"""Paged attention in torch: decodes of all rows at once, with pages read in place; longer queries a row at a time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from hf_paged.kernels.decode_index import DecodeIndex, build_decode_index
from hf_paged.kernels.fp8 import selected
from hf_paged.kernels.groups import build_groups
from hf_paged.kernels.native import GroupedStep, NativeOps, native_ops
from hf_paged.kernels.rows import ALL, PagedRows, TreeMask
from hf_paged.kernels.seen import Seen, build_seen, within
from hf_paged.kernels.sparse_decode import is_supported, sparse_decode

# Tokens of context up to which the queries of a longer row are computed one by one.
ONE_BY_ONE = 512
# Queries a row up to which they are computed one by one over any context.
FEW_QUERIES = 16


def paged_attention(
    query, key_pages, value_pages, rows: PagedRows, *, scale, window=None, softcap=None, sinks=None, fresh=None
) -> torch.Tensor:
    """See `hf_paged.kernels.paged_attention`."""
    if key_pages.dtype != query.dtype:
        fresh = None  # pages hold less of it, and what a row reads must not depend on how it is cut into steps
    native, n = _native(query, key_pages, rows), rows.num_decodes
    if native is not None:
        step = grouped_step(rows, window, query.shape[1] // key_pages.shape[1])
        if step is not None:
            return native.grouped(query, key_pages, value_pages, step, scale, softcap, sinks)
        seen = seen_by(rows, window)
        n = rows.derived("short", lambda: _short(rows))
        at = key_pages, value_pages, rows.page_table
        first = native.attention(query[:n], *at, seen.first(n), scale, softcap, sinks) if n else None
    else:
        first = _decode(query[:n], key_pages, value_pages, rows, scale, window, softcap, sinks) if n else None
    if n == len(query):
        return first
    out = query.new_empty(*query.shape[:2], value_pages.shape[-1])
    if n:
        out[:n] = first
    ends = np.cumsum(rows.query_lens)
    for row in range(int(np.searchsorted(ends, n, "right")), len(ends)):
        end, context = int(ends[row]), int(rows.context_lens[row])
        start = end - int(rows.query_lens[row])
        if start == end:
            continue
        if fresh is not None and context == end - start:
            key, value = (t[start:end].transpose(0, 1) for t in fresh)
        else:
            key, value = (_gather(pages, rows, row, context).to(query.dtype) for pages in (key_pages, value_pages))
        tree = None if rows.tree is None else _part(rows.tree, start, end)
        out[start:end] = _extend(query[start:end], key, value, scale, window, softcap, sinks, tree)
    return out


def _part(tree: TreeMask, start: int, end: int) -> TreeMask | None:
    """The mask of some queries; None where they are no tree."""
    if (tree.visible[start:end] == ALL).all():
        return None
    return TreeMask(tree.visible[start:end], tree.base[start:end], tree.positions[start:end])


def _native(query: torch.Tensor, key_pages: torch.Tensor, rows: PagedRows) -> NativeOps | None:
    """Compiled ops, where there are any and they serve these tensors."""
    fits = query.device.type == "cpu" and query.dtype == key_pages.dtype == torch.float32 and rows.backend == "auto"
    return native_ops() if fits else None


def grouped_step(rows: PagedRows, window: int | None, heads: int) -> GroupedStep | None:
    """What queries share, of which so many heads share keys; None where nothing is, or where a window hides some of it
    from some of them."""
    if not rows.grouped or (window is not None and rows.context_lens.max() > window):
        return None

    def make() -> GroupedStep | None:
        groups = build_groups(rows, heads)
        return None if groups is None else GroupedStep(rows.page_table, build_seen(rows, None), groups)

    return rows.derived(("grouped", heads), make)


def seen_by(rows: PagedRows, window: int | None) -> Seen:
    """What each query of the step sees, made once."""
    return rows.derived(("seen", window), lambda: build_seen(rows, window))


def _short(rows: PagedRows) -> int:
    """Queries, from the first, that are computed one by one: few a row, or over few slots. One pass over pages beats
    setting up dense products a row; long chunks of long contexts take the products."""
    long = (rows.query_lens > FEW_QUERIES) & (rows.context_lens > ONE_BY_ONE)
    rows_before = int(long.argmax()) if long.any() else len(long)
    return int(rows.query_lens[:rows_before].sum())


def _decode(query, key_pages, value_pages, rows, scale, window, softcap, sinks) -> torch.Tensor:
    """One query a row: products are batched over pages, the softmax over rows. `[rows, heads, value_dim]`."""
    if query.device.type == "cpu" and query.dtype == key_pages.dtype == torch.float32 and is_supported():
        return sparse_decode(query, key_pages, value_pages, rows, scale, window, softcap, sinks)
    index: DecodeIndex = rows.derived(("decode", window), lambda: build_decode_index(rows, window, query.device))
    n, heads, dim = query.shape
    kv_heads, size = key_pages.shape[1], rows.page_size
    keys, values = (index.select(pages).to(query.dtype) for pages in (key_pages, value_pages))
    pages = keys.shape[0]
    query = (query * scale).reshape(n, -1).index_select(0, index.owner).view(pages * kv_heads, heads // kv_heads, dim)
    scores = torch.bmm(query, keys.reshape(pages * kv_heads, size, dim).transpose(1, 2)).view(pages, heads * size)
    weights = []
    for group in index.groups:
        part = scores.index_select(0, group.pages).view(group.rows, group.width, heads, size).transpose(1, 2)
        part = part.reshape(group.rows, heads, group.width * size)
        if softcap is not None:
            part = part.div_(softcap).tanh_().mul_(softcap)
        # Not added: padding shows the pages of another row, whose numbers may not be finite.
        part = _softmax(part.masked_fill_(group.bias < 0, -torch.inf), sinks)
        weights.append(part.view(group.rows, heads, group.width, size).transpose(1, 2).reshape(-1, heads * size))
    weights = weights[0] if len(weights) == 1 else torch.cat(weights)
    weights = weights.index_select(0, index.back).view(pages * kv_heads, heads // kv_heads, size)
    parts = torch.bmm(weights, values.reshape(pages * kv_heads, size, -1)).view(pages, -1)
    return index.sum(parts).view(n, heads, -1)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last axis of `[rows, heads, keys]`, with a sink a head that takes its share and is dropped."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(1, -1, 1).expand(scores.shape[0], -1, 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _gather(pages: torch.Tensor, rows: PagedRows, row: int, context: int) -> torch.Tensor:
    """Keys or values of one row as `[kv_heads, context, dim]`."""

    def index() -> torch.Tensor:
        return torch.from_numpy(rows.page_table[row, : -(-context // rows.page_size)]).to(pages.device)

    taken = selected(pages, rows.derived(("pages", row), index))
    return taken.transpose(0, 1).reshape(pages.shape[1], -1, pages.shape[-1])[:, :context]


def _extend(query, key, value, scale, window, softcap, sinks, tree=None) -> torch.Tensor:
    """Queries `[n, heads, dim]` over one row's `[kv_heads, context, dim]`, of which the last n are their own keys."""
    length, context = query.shape[0], key.shape[1]
    plain = tree is None and (window is None or context <= window)
    query = query.transpose(0, 1)
    if softcap is None and sinks is None:
        causal = plain and length == context
        mask = None if causal or (plain and length == 1) else _mask(length, context, window, query.device, tree)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    heads = query.shape[0]
    grouped = query.reshape(key.shape[0], -1, query.shape[-1])
    scores = (torch.matmul(grouped, key.transpose(1, 2)) * scale).view(heads, length, context)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_mask(length, context, window, query.device, tree), -torch.inf).transpose(0, 1)
    weights = _softmax(scores.float(), sinks).to(query.dtype).transpose(0, 1).reshape(key.shape[0], -1, context)
    return torch.matmul(weights, value).view(heads, length, -1).transpose(0, 1)


def _mask(
    length: int, context: int, window: int | None, device: torch.device, tree: TreeMask | None = None
) -> torch.Tensor:
    """True where query `i` (slot `context - length + i`) may see slot `j`. Bool `[length, context]`."""
    query = np.arange(context - length, context)[:, None]
    key = np.arange(context)
    seen = key <= query
    if tree is not None:
        visible = tree.visible if window is None else within(tree, window)
        beyond = key - tree.base[:, None]
        seen &= (beyond < 0) | ((visible[:, None] >> np.clip(beyond, 0, 63)) & 1).astype(bool)
        query = tree.positions[:, None]
        if window is not None:
            seen &= (key > query - window) | (beyond >= 0)
    elif window is not None:
        seen &= key > query - window
    return torch.from_numpy(seen).to(device)
