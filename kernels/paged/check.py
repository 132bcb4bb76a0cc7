"""What a step must be for the ops to give right numbers: those who call them directly are told what is not.

The engine vouches for its own steps, and so pays nothing for this.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from hf_paged.kernels.rows import PagedRows


def check_attention(query, key_pages, value_pages, rows: PagedRows, *, scale, window, softcap, sinks) -> None:
    """Refuse arguments of `paged_attention` that would give wrong numbers. What `rows` says is looked at once a step.

    Raises:
        ValueError: names what is wrong, its value and what is allowed.
    """
    heads, num_pages = query.shape[1], key_pages.shape[0]
    require(math.isfinite(scale) and scale > 0, "scale", scale, "a finite number over 0")
    require(window is None or window >= 1, "window", window, "1 or more, or None")
    require(softcap is None or softcap > 0, "softcap", softcap, "a number over 0, or None")
    check_heads(query, key_pages)
    _check_pages(key_pages, value_pages, rows)
    given = None if sinks is None else tuple(sinks.shape)
    require(given in (None, (heads,)), "sinks.shape", given, f"({heads},), one a head")
    rows.derived(("checked", len(query), num_pages), lambda: _check_rows(rows, len(query), num_pages))


def check_new(key, value, key_pages, value_pages, rows: PagedRows) -> None:
    """The same for `write_kv`. Slots on a CPU are looked at too: elsewhere the host would wait for them."""
    _check_pages(key_pages, value_pages, rows)
    for name, new, pages in (("key", key, key_pages), ("value", value, value_pages)):
        wanted = len(rows.slots), pages.shape[1], pages.shape[3]
        require(tuple(new.shape) == wanted, f"{name}.shape", tuple(new.shape), f"{wanted}")
    if rows.slots.device.type == "cpu" and len(rows.slots):
        least, most, count = int(rows.slots.min()), int(rows.slots.max()), key_pages.shape[0] * key_pages.shape[2]
        require(least >= -1, "rows.slots", least, "slots, or -1 for a token that goes nowhere")
        require(most < count, "rows.slots", most, f"under {count}, the slots that there are")


def check_heads(query: torch.Tensor, key_pages: torch.Tensor) -> None:
    """Refuse heads of a query that do not go with those of the keys."""
    (heads, dim), (_, kv_heads, _, key_dim) = query.shape[1:], key_pages.shape
    require(dim == key_dim, "query's head_dim", dim, f"that of the keys, {key_dim}")
    require(heads % kv_heads == 0, "query's heads", heads, f"a multiple of the {kv_heads} KV heads")


def _check_pages(key_pages: torch.Tensor, value_pages: torch.Tensor, rows: PagedRows) -> None:
    wanted, given = tuple(key_pages.shape[:3]), tuple(value_pages.shape[:3])
    require(given == wanted, "value_pages.shape[:3]", given, f"that of the keys, {wanted}")
    kind = value_pages.dtype
    require(kind == key_pages.dtype, "value_pages.dtype", kind, f"that of the keys, {key_pages.dtype}")
    require(rows.page_size == wanted[2], "rows.page_size", rows.page_size, f"that of the pages, {wanted[2]}")


def _check_rows(rows: PagedRows, tokens: int, num_pages: int) -> bool:
    queries, contexts, table, n = rows.query_lens, rows.context_lens, rows.page_table, rows.num_decodes
    counts = len(queries), len(contexts), len(table)
    require(len(set(counts)) == 1, "lengths of query_lens, context_lens and page_table", counts, "the same")
    require(0 <= n <= counts[0], "rows.num_decodes", n, f"0 to {counts[0]}, the rows")
    require((queries[:n] == 1).all(), "rows.query_lens", queries.tolist(), f"1 in the first {n} rows, the decodes")
    require((queries >= 0).all(), "rows.query_lens", queries.tolist(), "0 or more")
    require(int(queries.sum()) == tokens, "sum of rows.query_lens", int(queries.sum()), f"{tokens}, the queries")
    # A row that sees nothing has no slot of its own either.
    short = (contexts < queries) & (contexts > 0) | (contexts < 0)
    require(not short.any(), "rows.context_lens", contexts.tolist(), "as many as query_lens at least, or 0")
    if rows.tree is not None:
        require(len(rows.tree.visible) == tokens, "rows.tree.visible", len(rows.tree.visible), f"{tokens} numbers")
    used, width = -(-contexts // rows.page_size), table.shape[1]
    require(
        (used <= width).all(), "rows.page_table", table.shape, f"{int(used.max(initial=0))} pages a row for contexts"
    )
    pages = table[np.arange(width) < used[:, None]]
    outside = pages[(pages < 0) | (pages >= num_pages)]
    require(not len(outside), "rows.page_table", outside[:1].tolist(), f"pages 0 to {num_pages - 1} within contexts")
    return True


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise the `ValueError` that all that is refused here gives: its name, its value and what is allowed."""
    if not ok:
        raise ValueError(f"{name}={value} is not allowed: {allowed}")
