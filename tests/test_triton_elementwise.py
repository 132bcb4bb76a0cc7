"""Norms, rotation and gates by Triton kernels against torch's, in Triton's interpreter, or on a GPU."""

import os

import interpreter  # noqa: F401  (before Triton is imported)
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_paged.integrations.elementwise import TorchElementwise, TritonElementwise
from hf_paged.kernels.fp8 import FP8
from hf_paged.kernels.rows import PagedRows

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


def norm_of(dim: int, dtype: torch.dtype) -> nn.Module:
    norm = nn.RMSNorm(dim, device=DEVICE, dtype=dtype)
    norm.weight.data = torch.randn(dim, device=DEVICE, dtype=dtype)
    norm.variance_epsilon = 1e-6
    return norm


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_norms_and_gates(dtype):
    from hf_paged.kernels.gate import silu_mul
    from hf_paged.kernels.rms_norm import rms_norm

    torch.manual_seed(0)
    near = {"atol": NEAR[dtype], "rtol": NEAR[dtype]}
    for lines, dim in ((1, 64), (3, 100), (0, 8)):
        wide, norm = torch.randn(lines, 2 * dim, device=DEVICE, dtype=dtype), norm_of(dim, dtype)
        got = rms_norm(wide[:, dim:], norm.weight, 1e-6)
        torch.testing.assert_close(got, TorchElementwise().rms_norm(wide[:, dim:], norm), **near)
    gate, up = (torch.randn(5, 300, device=DEVICE, dtype=dtype) * 3 for _ in range(2))
    wanted = F.silu(gate) * up
    torch.testing.assert_close(silu_mul(gate, up), wanted, **near)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("dim, normed, narrow", [(32, True, False), (20, False, False), (20, True, True)])
def test_rotation_with_storing(dtype, dim, normed, narrow, monkeypatch):
    """Queries and keys are parts of one tensor; a slot under 0 takes nothing."""
    from hf_paged.integrations import elementwise

    monkeypatch.setattr(elementwise, "runs_triton", lambda *_: True)
    torch.manual_seed(0)
    tokens, heads, kv_heads, size = 3, 4, 2, 4
    joined = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=DEVICE, dtype=dtype)
    parts = [part.view(tokens, -1, dim) for part in joined.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)]
    angles = torch.rand(tokens, dim // 2, device=DEVICE).repeat(1, 2)
    norms = (norm_of(dim, dtype), norm_of(dim, dtype)) if normed else None
    slots = torch.tensor([9, 6, 13], device=DEVICE)
    rows = PagedRows(
        size, tokens, np.ones(tokens, np.int64), np.ones(tokens, np.int64), np.ones((3, 1)), slots, "torch"
    )
    made = []
    for ops in (TorchElementwise(), TritonElementwise()):
        kind = FP8 if narrow else dtype
        pages = tuple(torch.zeros(5, kv_heads, size, dim, device=DEVICE, dtype=kind) for _ in range(2))
        rotation = ops.rotation(angles.cos().to(dtype), angles.sin().to(dtype))
        made.append((*ops.rotate_and_store(*parts, rotation, pages, slots, rows, norms), *pages))
    for got, wanted in zip(made[1], made[0], strict=True):
        near = 1 / 8 if got.dtype == FP8 else NEAR[dtype]  # of numbers beside a rounding step
        torch.testing.assert_close(got.to(dtype), wanted.to(dtype), atol=NEAR[dtype], rtol=near)
    from hf_paged.kernels.rotate import rotate_and_store

    pages = [torch.zeros(5, kv_heads, size, dim, device=DEVICE, dtype=dtype) for _ in range(2)]
    cos, sin = (part[:, 0] for part in rotation)
    rotate_and_store(*parts, cos, sin, *pages, torch.full_like(slots, -1))
    assert not any(part.any() for part in pages)
