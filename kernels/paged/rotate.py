"""Queries and keys on their way to attention, in one kernel: heads' norms if the model has any, rotation, storing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, padded, power_of_two
from hf_paged.kernels.overlap import admit_next, await_others, overlap
from hf_paged.kernels.write_triton import as_stored


@triton.jit
def _rotated(at, weight, cosine, sine, there, eps, DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """Heads at `at` `[LINES, 1]`, in two halves `[LINES, HALF]`: normed, then rotated (Su et al., "RoFormer", 2021).
    float32."""
    d = tl.arange(0, HALF)[None, :]
    inside = d < DIM // 2
    first = tl.load(at + d, mask=there, other=0.0)
    second = tl.load(at + DIM // 2 + d, mask=there, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt_rn(tl.sum(first * first + second * second, 1) / DIM + eps)
        low = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(weight + DIM // 2 + d, mask=inside, other=0.0).to(tl.float32)
        first = ((first * scale[:, None]).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
        second = ((second * scale[:, None]).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit(do_not_specialize=["query_eps", "key_eps"])
def rotate_kernel(
    query, key, value, query_weight, key_weight, cosines, sines, slots, new_query, new_key, key_pages, value_pages,
    query_token, key_token, value_token, query_eps, key_eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    LINES: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`LINES` heads of one token: queries' first, then keys' with their values. A slot under 0 takes nothing.

    Of cosines and sines `[tokens, head_dim]` the second half is read; sines have another sign in the first.
    """
    await_others(OVERLAP)
    admit_next(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    QUERIES: tl.constexpr = (HEADS + LINES - 1) // LINES
    d = tl.arange(0, HALF)[None, :]
    inside = d < DIM // 2
    cosine = tl.load(cosines + token * DIM + DIM // 2 + d, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sines + token * DIM + DIM // 2 + d, mask=inside, other=0.0).to(tl.float32)
    line = tl.arange(0, LINES)[:, None]
    if block < QUERIES:
        head = block * LINES + line
        there = inside & (head < HEADS)
        at = query + token * query_token + head * DIM
        first, second = _rotated(at, query_weight, cosine, sine, there, query_eps, DIM, HALF, NORM)
        out = new_query + (token * HEADS + head) * DIM + d
        tl.store(out, first.to(new_query.dtype.element_ty), mask=there)
        tl.store(out + DIM // 2, second.to(new_query.dtype.element_ty), mask=there)
    else:
        own = (block - QUERIES) * LINES + line
        there = inside & (own < KV_HEADS)
        source = key + token * key_token + own * DIM
        low, high = _rotated(source, key_weight, cosine, sine, there, key_eps, DIM, HALF, NORM)
        low = low.to(new_key.dtype.element_ty)
        high = high.to(new_key.dtype.element_ty)
        fresh = new_key + (token * KV_HEADS + own) * DIM + d
        tl.store(fresh, low, mask=there)
        tl.store(fresh + DIM // 2, high, mask=there)
        slot = tl.load(slots + token)
        stored = there & (d < (DIM // 2) * (slot >= 0).to(tl.int32))
        place = ((slot // PAGE_SIZE * KV_HEADS + own) * PAGE_SIZE + slot % PAGE_SIZE) * DIM + d
        tl.store(key_pages + place, as_stored(low, key_pages), mask=stored)
        tl.store(key_pages + place + DIM // 2, as_stored(high, key_pages), mask=stored)
        new_value = value + token * value_token + own * DIM + d
        low = tl.load(new_value, mask=stored)
        high = tl.load(new_value + DIM // 2, mask=stored)
        tl.store(value_pages + place, as_stored(low, value_pages), mask=stored)
        tl.store(value_pages + place + DIM // 2, as_stored(high, value_pages), mask=stored)


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slots: torch.Tensor,
    norms: tuple[torch.Tensor, float, torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, store keys and values.

    Args:
        query, key, value: `[tokens, heads, head_dim]`, heads of a token one after another.
        cosines, sines: `[tokens, head_dim]`, contiguous.
        key_pages, value_pages: `[num_pages, kv_heads, page_size, head_dim]`, contiguous.
        slots: int64 `[tokens]`; under 0: not stored.
        norms: weight and epsilon of the heads' norm, for queries and for keys.

    Returns:
        the rotated queries and keys, contiguous.
    """
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    new_key = torch.empty(tokens, kv_heads, dim, dtype=key.dtype, device=key.device)
    query_weight, query_eps, key_weight, key_eps = norms or (query, 0.0, query, 0.0)
    shape = HeadShape(heads // kv_heads, kv_heads, dim, dim, query.element_size(), key_pages.shape[2])
    if tokens:
        constants = rotate_constants(shape, norms is not None)
        blocks = sum(-(-count // constants["LINES"]) for count in (heads, kv_heads))
        rotate_kernel[(tokens, blocks)](
            query, key, value, query_weight, key_weight, cosines, sines, slots, out, new_key, key_pages, value_pages,
            query.stride(0), key.stride(0), value.stride(0), query_eps, key_eps,
            **constants, **overlap(query.device), num_warps=rotate_warps(constants),
        )  # fmt: skip
    return out, new_key


def rotate_constants(shape: HeadShape, norm: bool) -> dict:
    """What `rotate_kernel` is compiled for."""
    heads = shape.group * shape.kv_heads
    return {
        "HEADS": heads,
        "KV_HEADS": shape.kv_heads,
        "PAGE_SIZE": shape.page_size,
        "DIM": shape.key_dim,
        "HALF": padded(shape.key_dim) // 2,
        "LINES": min(8, power_of_two(heads)),
        "NORM": norm,
    }


def rotate_warps(constants: dict) -> int:
    """Warps of a program: eight elements of each half a thread."""
    return min(max(constants["LINES"] * constants["HALF"] // 256, 1), 8)
