"""Attention and cache ops over paged KV: signatures and choice of backend.

Only torch is imported here; a backend is imported when it is first chosen. Layout of the pages of one layer:
`[num_pages, kv_heads, page_size, head_dim]`.
"""

from __future__ import annotations

from hf_paged.kernels.backends import choose_backend, runs_triton, with_fallback
from hf_paged.kernels.check import check_attention, check_new
from hf_paged.kernels.rows import PagedRows


def write_kv(key, value, key_pages, value_pages, rows: PagedRows) -> None:
    """Store keys and values of a step's tokens in their slots.

    Args:
        key: `[tokens, kv_heads, head_dim]`.
        value: `[tokens, kv_heads, value_dim]`.
        key_pages: `[num_pages, kv_heads, page_size, head_dim]`, written in place.
        value_pages: `[num_pages, kv_heads, page_size, value_dim]`, written in place.
        rows: the step's rows; `rows.slots` says where (-1: nowhere).

    Raises:
        ValueError: arguments do not go together, unless `rows` are vouched for; keys and values differ from their pages
            in dtype (where the Triton kernels run).
    """
    from hf_paged.kernels.write import write_kv as run

    if not rows.vouched:
        check_new(key, value, key_pages, value_pages, rows)
    tensors = key, value, key_pages, value_pages, rows
    if runs_triton(key_pages.device.type, rows.backend):
        from hf_paged.kernels import triton_path

        if triton_path.serves(key_pages.shape[1], key_pages, value_pages):
            triton_path.check_new(key, value, key_pages, value_pages)
            return with_fallback(triton_path.write_kv, run, *tensors)
    run(*tensors)


def paged_attention(
    query, key_pages, value_pages, rows: PagedRows, *, scale, window=None, softcap=None, sinks=None, fresh=None
):
    """Causal attention of every row's queries over its pages, which hold their own keys and values already.

    Grouped-query attention: query head `h` reads KV head `h // (heads // kv_heads)`.

    Args:
        query: `[tokens, heads, head_dim]`, rows one after another, in `rows`' order.
        key_pages, value_pages: as for `write_kv`.
        rows: which pages and how many tokens each row reads.
        scale: multiplies the products of queries and keys.
        window: tokens that a query sees, itself included (sliding window); None: all.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: `[heads]`, a logit a head that takes part in the softmax and has no value.
        fresh: `(key, value)` of this step's tokens, as for `write_kv`: rows without history then need not read pages.

    Returns:
        `[tokens, heads, value_dim]`, in the query's dtype.

    Raises:
        ValueError: arguments do not go together, unless `rows` are vouched for; queries and pages differ in dtype or
            head_dim (where the Triton kernels run).
    """
    from hf_paged.kernels.torch_path import paged_attention as run

    if not rows.vouched:
        given = dict(scale=scale, window=window, softcap=softcap, sinks=sinks)
        check_attention(query, key_pages, value_pages, rows, **given)
    tensors = query, key_pages, value_pages, rows
    options = dict(scale=scale, window=window, softcap=softcap, sinks=sinks, fresh=fresh)
    if runs_triton(query.device.type, rows.backend):
        from hf_paged.kernels import triton_path

        if triton_path.serves(query.shape[1], key_pages, value_pages):
            triton_path.check(query, key_pages, value_pages, scale)
            return with_fallback(triton_path.paged_attention, run, *tensors, **options)
    return run(*tensors, **options)


__all__ = ["PagedRows", "choose_backend", "paged_attention", "runs_triton", "with_fallback", "write_kv"]
