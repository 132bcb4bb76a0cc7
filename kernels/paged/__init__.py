"""Attention and cache ops over paged KV: signatures and choice of backend.

Only torch is imported here; a backend is imported when it is first chosen. Layout of the pages of one layer:
`[num_pages, kv_heads, page_size, head_dim]`.
"""

from __future__ import annotations

from hf_paged.kernels.rows import PagedRows


def choose_backend(wanted: str, device_type: str) -> tuple[str, str]:
    """Name of the backend to use, and why.

    Args:
        wanted: `auto`, `torch` or `triton`.
        device_type: type of the model's device, as in `torch.device.type`.
    """
    if wanted == "torch":
        return "torch", "asked for"
    if device_type == "cpu":
        from hf_paged.kernels.native import native_status

        ops, how = native_status()
        return "torch", f"the model is on a CPU; {'float32 ops ' if ops else 'no compiled ops: '}{how}"
    return "torch", f"there are no Triton kernels yet (the model is on {device_type})"


def write_kv(key, value, key_pages, value_pages, rows: PagedRows) -> None:
    """Store keys and values of a step's tokens in their slots.

    Args:
        key: `[tokens, kv_heads, head_dim]`.
        value: `[tokens, kv_heads, value_dim]`.
        key_pages: `[num_pages, kv_heads, page_size, head_dim]`, written in place.
        value_pages: `[num_pages, kv_heads, page_size, value_dim]`, written in place.
        rows: the step's rows; `rows.slots` says where (slots of page 0 take what must go nowhere).
    """
    from hf_paged.kernels.write import write_kv as run

    run(key, value, key_pages, value_pages, rows)


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
    """
    from hf_paged.kernels.torch_path import paged_attention as run

    return run(
        query, key_pages, value_pages, rows, scale=scale, window=window, softcap=softcap, sinks=sinks, fresh=fresh
    )


__all__ = ["PagedRows", "choose_backend", "paged_attention", "write_kv"]
