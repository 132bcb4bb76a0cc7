"""RMS norm of lines, as transformers' modules compute it: in float32, rounded, then times the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import power_of_two
from hf_paged.kernels.overlap import admit_next, await_others, overlap


@triton.jit
def normed(x, weight, DIM: tl.constexpr, eps):
    """Zhang and Sennrich, NeurIPS 2019: of `x` `[lines, BLOCK]` float32, 0 behind `DIM`; in the dtype of `weight`."""
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / DIM + eps)
    rounded = (x * scale[:, None]).to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype)


@triton.jit(do_not_specialize=["eps"])
def rms_norm_kernel(x, weight, out, stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One line."""
    await_others(OVERLAP)
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + line * stride + d, mask=d < DIM, other=0.0).to(tl.float32)
    weights = tl.load(weight + d, mask=d < DIM, other=0.0)
    admit_next(OVERLAP)
    tl.store(out + line * DIM + d, normed(values, weights, DIM, eps), mask=d < DIM)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of each line of `x` `[lines, dim]`, elements one after another; `weight` `[dim]`, of the same dtype."""
    lines, dim = x.shape
    out = torch.empty(lines, dim, dtype=x.dtype, device=x.device)
    if lines:
        block = power_of_two(dim)
        constants = norm_constants(dim) | overlap(x.device)
        rms_norm_kernel[(lines,)](x, weight, out, x.stride(0), eps, **constants, num_warps=norm_warps(block))
    return out


def norm_constants(dim: int) -> dict:
    """What `rms_norm_kernel` is compiled for."""
    return {"DIM": dim, "BLOCK": power_of_two(dim)}


def norm_warps(block: int) -> int:
    """Warps of a line: eight elements a thread."""
    return min(max(block // 256, 1), 16)
