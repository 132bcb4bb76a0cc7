"""Scatter of new keys and values into their slots, both in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import HeadShape, head_shape, padded, power_of_two


@triton.jit
def as_stored(x, pages):
    """`x` as `pages` hold it. In fp8 (e4m3, see `fp8.py`) what is too large becomes the largest number; NaN stays.

    Rounded by hand, to nearest, ties to even: cards and Triton's interpreter each do it in a way of their own.
    """
    if pages.dtype.element_ty.is_fp8():
        x = x.to(tl.float32)
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15  # 2^23: the sum's last bit is worth 1
        code = tl.where(size < 0.015625, small, normal)
        code = tl.where(x == x, code, 127) | ((x.to(tl.int32, bitcast=True) >> 24) & 128)
        stored = code.to(tl.uint8).to(pages.dtype.element_ty, bitcast=True)
    else:
        stored = x.to(pages.dtype.element_ty)
    return stored


@triton.jit
def write_kernel(
    key,
    value,
    key_pages,
    value_pages,
    slots,
    key_token,
    key_head,
    value_token,
    value_head,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token and `BLOCK_H` of its heads. A slot under 0 takes nothing."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    line = (slot // PAGE_SIZE * KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    keys = (head < KV_HEADS)[:, None] & (d < KEY_DIM)[None, :]
    values = (head < KV_HEADS)[:, None] & (v < VALUE_DIM)[None, :]
    new_key = tl.load(key + token * key_token + head[:, None] * key_head + d[None, :], mask=keys)
    new_value = tl.load(value + token * value_token + head[:, None] * value_head + v[None, :], mask=values)
    tl.store(key_pages + line[:, None] * KEY_DIM + d[None, :], as_stored(new_key, key_pages), mask=keys)
    tl.store(value_pages + line[:, None] * VALUE_DIM + v[None, :], as_stored(new_value, value_pages), mask=values)


def write(
    key: torch.Tensor, value: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store `[tokens, kv_heads, dim]`, whose elements of a head lie one after another, in contiguous pages.

    `slots` is int64 `[tokens]`, contiguous: `page * page_size + offset`; tokens with a slot under 0 are skipped.
    """
    tokens, kv_heads, _ = key.shape
    constants = write_constants(head_shape(kv_heads, key_pages, value_pages))
    grid = (tokens, -(-kv_heads // constants["BLOCK_H"]))
    strides = *key.stride()[:2], *value.stride()[:2]
    write_kernel[grid](key, value, key_pages, value_pages, slots, *strides, **constants)


def write_constants(shape: HeadShape) -> dict:
    """What `write_kernel` is compiled for."""
    block_d, block_v = padded(shape.key_dim), padded(shape.value_dim)
    return {
        "KV_HEADS": shape.kv_heads,
        "PAGE_SIZE": shape.page_size,
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_H": min(power_of_two(shape.kv_heads), max(1, 4096 // max(block_d, block_v))),
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
    }
