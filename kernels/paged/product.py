"""Products of a few lines with weights, where reading the weights is what takes time: layers of one input in one pass.

The weights are the left side of the matrix product, so that a line's numbers do not depend on how many lines there are:
its sums run over the same blocks in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hf_paged.kernels.card import target_of
from hf_paged.kernels.launch import FEW_LINES, ProductConfig, power_of_two, product_config
from hf_paged.kernels.overlap import admit_next, await_others, overlap


@triton.jit
def load_part(weight, inner, n, k, there, EVEN: tl.constexpr, K: tl.constexpr):
    """`[BLOCK_N, BLOCK_K]` of a weight `[out, K]`; 0 where `there` says no, or behind `K` unless `EVEN`."""
    at = weight + n[:, None].to(tl.int64) * K + (inner + k)[None, :]
    if EVEN:
        return tl.load(at, mask=there[:, None], other=0.0)
    return tl.load(at, mask=there[:, None] & (inner + k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["lines"])
def product_kernel(
    x, first, second, third, first_bias, second_bias, third_bias, other, out, lines, stride,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, K: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`BLOCK_N` outputs of all lines.

    `x` `[lines, K]`; weights `[FIRST, K]`, `[SECOND, K]`, `[THIRD, K]`, of which only those over 0 are read; `out`
    `[lines, FIRST + SECOND + THIRD]`. With `GATED` it is `[lines, FIRST]`: silu of the first product times the second.
    With `ADD`, `other` of the shape of `out` is added.
    """
    tile = tl.program_id(0)
    weight = first
    bias = first_bias
    size = FIRST
    column = 0
    if tile >= tl.cdiv(FIRST, BLOCK_N):  # of a gated product there are no such tiles
        tile -= tl.cdiv(FIRST, BLOCK_N)
        weight = second
        bias = second_bias
        size = SECOND
        column = FIRST
        if tile >= tl.cdiv(SECOND, BLOCK_N):
            tile -= tl.cdiv(SECOND, BLOCK_N)
            weight = third
            bias = third_bias
            size = THIRD
            column = FIRST + SECOND
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.arange(0, BLOCK_L)
    k = tl.arange(0, BLOCK_K)
    there = n < size
    await_others(OVERLAP)
    acc = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    for inner in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        part = load_part(weight, inner, n, k, there, EVEN, K)
        at = x + line[None, :] * stride + (inner + k)[:, None]
        real = (line < lines)[None, :]
        if not EVEN:
            real = real & (inner + k < K)[:, None]
        given = tl.load(at, mask=real, other=0.0)
        acc = tl.dot(part, given, acc)
        if GATED:
            up = tl.dot(load_part(second, inner, n, k, there, EVEN, K), given, up)
    admit_next(OVERLAP)
    kept = there[:, None] & (line < lines)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    dtype = out.dtype.element_ty
    if GATED:  # rounded where torch's ops round
        if BIAS:
            up += tl.load(second_bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
        gate = acc.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = silu * up.to(dtype).to(tl.float32)
    to = line[None, :].to(tl.int64) * (FIRST if GATED else FIRST + SECOND + THIRD) + column + n[:, None]
    if ADD:
        acc += tl.load(other + to, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + to, acc.to(dtype), mask=kept)


Part = tuple[torch.Tensor, torch.Tensor | None]


def serves(x: torch.Tensor, parts: Sequence[Part], add: torch.Tensor | None = None) -> bool:
    """Whether `product` takes these: see there."""
    if x.dim() != 2 or len(x) > FEW_LINES or x.stride(1) != 1 or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    alike = all(weight.dtype == x.dtype and weight.is_contiguous() for weight, _ in parts)
    biased = {bias is not None for _, bias in parts}
    return alike and len(biased) == 1 and (add is None or (add.dtype == x.dtype and add.is_contiguous()))


def product(x: torch.Tensor, *parts: Part, gated: bool = False, add: torch.Tensor | None = None) -> torch.Tensor:
    """Products of `x` with up to three weights, beside each other.

    Args:
        x: `[lines, in]`, at most `FEW_LINES`, elements of a line one after another; bfloat16 or float16.
        parts: weight `[out, in]`, contiguous, and bias `[out]` or None (all have one, or none has).
        gated: of two parts: silu of the first's times the second's.
        add: `[lines, outs]`, contiguous: added, and written over.
    Returns:
        `[lines, sum of outs]`, or with `gated` `[lines, out]`.
    """
    lines, inner = x.shape
    weights, biases = zip(*parts, strict=True)
    sizes = [len(weight) for weight in weights]
    outs = sizes[0] if gated else sum(sizes)
    out = x.new_empty(lines, outs) if add is None else add
    config = product_config(outs, inner, lines, 1 + gated, target_of(x.device))
    blocks = [-(-size // config.block_n) for size in sizes]
    spare = 3 - len(parts)
    with_bias = biases[0] is not None
    sizes += [0] * spare
    constants = product_constants(sizes, inner, lines, config, bias=with_bias, add=add is not None, gated=gated)
    weights += (weights[0],) * spare
    biases = (biases + (biases[0],) * spare) if with_bias else weights
    if lines:
        product_kernel[(blocks[0] if gated else sum(blocks),)](
            x, *weights, *biases, out, out, lines, x.stride(0), **constants,
            **overlap(x.device), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def product_constants(
    sizes: list[int], inner: int, lines: int, config: ProductConfig, *, bias: bool, add: bool, gated: bool
) -> dict:
    """What `product_kernel` is compiled for."""
    first, second, third = sizes
    return {
        "FIRST": first,
        "SECOND": second,
        "THIRD": third,
        "K": inner,
        "BLOCK_L": max(16, power_of_two(lines)),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "EVEN": inner % config.block_k == 0,
        "BIAS": bias,
        "ADD": add,
        "GATED": gated,
    }
