"""silu(gate) * up, of a gated MLP, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GATE_BLOCK = 1024


@triton.jit
def gate_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    """`BLOCK` elements; rounded where torch's two ops round."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    x = tl.load(gate + place, mask=there, other=0.0)
    y = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(x.dtype).to(tl.float32)
    tl.store(out + place, (silu * y).to(x.dtype), mask=there)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Of two contiguous tensors of one shape and dtype; written over `gate`."""
    size = gate.numel()
    if size:
        gate_kernel[(-(-size // GATE_BLOCK),)](gate, up, gate, size, BLOCK=GATE_BLOCK, num_warps=4)
    return gate
