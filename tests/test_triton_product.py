"""Products of a few lines by the Triton kernel against torch's, in Triton's interpreter, or on a GPU."""

import os
from types import SimpleNamespace

import interpreter  # noqa: F401  (before Triton is imported)
import pytest
import torch
from torch import nn

from hf_paged.integrations import linear
from hf_paged.integrations.linear import TorchLinear, TritonLinear
from hf_paged.kernels.launch import FEW_LINES, LEAST_SHARED, Target, product_config

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]  # the interpreter has no products of bfloat16
SHAPES = [(1, 64, (32, 16, 16)), (3, 200, (70, 20, 20)), (17, 128, (64, 64, 64)), (64, 72, (33, 8, 8))]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(linear, "runs_triton", lambda *_: True)


def layer_of(inner: int, outs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inner, outs, bias, device=DEVICE, dtype=dtype).requires_grad_(False)


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 2e-2 if got.dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lines, inner, outs", SHAPES)
def test_products_are_those_of_torch(lines, inner, outs, bias, dtype):
    torch.manual_seed(0)
    made, plain = TritonLinear(), TorchLinear()
    x = torch.randn(lines, inner + 8, device=DEVICE, dtype=dtype)[:, 3 : inner + 3]
    q, k, v = (layer_of(inner, size, bias, dtype) for size in outs)
    heads = SimpleNamespace(q_proj=q, k_proj=k, v_proj=v)
    for got, wanted in zip(made.heads(x, heads), plain.heads(x, heads), strict=True):
        near(got, wanted)
    near(made.linear(x, q), plain.linear(x, q))
    other = torch.randn(lines, outs[0], device=DEVICE, dtype=dtype)
    near(made.add(x, q, other.clone()), plain.add(x, q, other.clone()))
    mlp = SimpleNamespace(gate_proj=q, up_proj=layer_of(inner, outs[0], bias, dtype))
    near(made.gated(x, mlp), plain.gated(x, mlp))


@pytest.mark.skipif(not GPU, reason="the interpreter's products are numpy's")
def test_a_line_does_not_depend_on_the_others():
    """Bit by bit, for every number of lines that the kernel takes."""
    torch.manual_seed(0)
    layer, up = (layer_of(256, 96, False, DTYPES[-1]) for _ in range(2))
    x = torch.randn(FEW_LINES, 256, device=DEVICE, dtype=DTYPES[-1])
    mlp = SimpleNamespace(gate_proj=layer, up_proj=up)
    whole, gated = TritonLinear().linear(x, layer), TritonLinear().gated(x, mlp)
    for lines in (1, 2, 16, 17, 33, 64):
        assert torch.equal(TritonLinear().linear(x[:lines], layer), whole[:lines])
        assert torch.equal(TritonLinear().gated(x[:lines], mlp), gated[:lines])


def test_what_the_kernel_does_not_serve(monkeypatch):
    """Many lines, float32, biases here and there, weights that are parts of others: torch's products."""
    from hf_paged.kernels import product

    half, made, plain = torch.bfloat16, TritonLinear(), TorchLinear()
    layer, single = layer_of(16, 8, False, half), layer_of(16, 8, False, torch.float32)
    part = layer_of(16, 8, False, half)
    part.weight.data = torch.randn(8, 32, device=DEVICE, dtype=half)[:, ::2]
    heads = SimpleNamespace(q_proj=layer_of(16, 8, True, half), k_proj=layer, v_proj=layer)
    x = torch.randn(FEW_LINES + 1, 16, device=DEVICE, dtype=half)
    for got, wanted in zip(made.heads(x[:0], heads), plain.heads(x[:0], heads), strict=True):
        near(got, wanted)  # one after another
    monkeypatch.setattr(product, "product_kernel", None)
    near(made.linear(x, layer), plain.linear(x, layer))
    near(made.linear(x[:3].float(), single), plain.linear(x[:3].float(), single))
    near(made.linear(x[:3], part), plain.linear(x[:3], part))


@pytest.mark.parametrize("arch, backend", [("sm_80", "cuda"), ("sm_90", "cuda"), ("sm_86", "cuda"), ("gfx942", "hip")])
def test_blocks_depend_on_shape_and_card_alone(arch, backend):
    target = Target(backend, arch, 108)
    for outs, inner, weights in ((6144, 4096, 1), (4096, 14336, 1), (1024, 2048, 1), (28672, 4096, 2), (8, 64, 2)):
        configs = [product_config(outs, inner, lines, weights, target) for lines in (1, 16, 33, 64)]
        assert len({(config.block_n, config.block_k, config.warps) for config in configs}) == 1
        for lines, config in zip((16, 16, 64, 64), configs, strict=True):
            held = config.stages * config.block_k * (weights * config.block_n + lines) * 2
            assert held <= max(target.shared, LEAST_SHARED)
