"""Linear layers with what follows them: plain torch, or oneDNN's fused ones where they are there and right.

On CPUs whose vendor's BLAS is not the one that torch was built with, float32 products through oneDNN take a half to a
third of the time, and one to four rows cost the same; it reads the weights where they are, without a packed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_paged.integrations.copies import Watched
from hf_paged.kernels import runs_triton, with_fallback
from hf_paged.kernels.native import NativeOps
from hf_paged.kernels.native_products import ProductOps, product_ops


class TorchLinear:
    """Each method applies `layer` to `x` `[tokens, in]` and gives `[tokens, out]`."""

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        p = layer._parameters
        return F.linear(x, p["weight"], p["bias"])

    def heads(self, x: torch.Tensor, attention: nn.Module) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, `[tokens, heads * head_dim]` each; they may be parts of one tensor."""
        return tuple(self.linear(x, layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))

    def gated(self, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        """silu(gate(x)) * up(x)"""
        return self.mul(x, mlp.up_proj, self.silu(x, mlp.gate_proj))

    def silu(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """silu(layer(x))"""
        return F.silu(self.linear(x, layer))

    def mul(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        """layer(x) * other"""
        return self.linear(x, layer).mul_(other)

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        """layer(x) + other, which may be written over."""
        return self.linear(x, layer).add_(other)


class TritonLinear(TorchLinear):
    """The same on a GPU: few lines by a kernel that reads weights as fast as they come, more of them by torch."""

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self._few(lambda: super(TritonLinear, self).linear(x, layer), x, layer)

    def heads(self, x: torch.Tensor, attention: nn.Module) -> tuple[torch.Tensor, ...]:
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        made = self._few(lambda: super(TritonLinear, self).heads(x, attention), x, *layers)
        return made if isinstance(made, tuple) else made.split([layer.out_features for layer in layers], -1)

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        def instead() -> torch.Tensor:
            p = layer._parameters
            plain = p["bias"] is None
            return other.addmm_(x, p["weight"].t()) if plain else super(TritonLinear, self).add(x, layer, other)

        return self._few(instead, x, layer, add=other)

    def gated(self, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        def instead() -> torch.Tensor:
            from hf_paged.kernels.gate import silu_mul

            if not runs_triton(x.device.type, "auto"):
                return super(TritonLinear, self).gated(x, mlp)
            gate, up = self.linear(x, mlp.gate_proj), self.linear(x, mlp.up_proj)
            return with_fallback(silu_mul, lambda *_: F.silu(gate).mul_(up), gate, up)

        return self._few(instead, x, mlp.gate_proj, mlp.up_proj, gated=True)

    @staticmethod
    def _few(instead: Callable[[], Any], x: torch.Tensor, *layers: nn.Linear, **options: Any) -> Any:
        """By the kernel for few lines where it serves them, else `instead`, which gives the same."""
        if not runs_triton(x.device.type, "auto"):
            return instead()
        from hf_paged.kernels.product import product, serves

        parts = [parameters(layer) for layer in layers]
        if not serves(x, parts, options.get("add")):
            return instead()
        return with_fallback(product, lambda *_, **__: instead(), x, *parts, **options)


class OneDnnLinear(TorchLinear):
    """The same through oneDNN, with the second operation inside the product."""

    def __init__(self) -> None:
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def weight(self, layer: nn.Linear) -> torch.Tensor:
        return layer._parameters["weight"]

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self._run(x, self.weight(layer), layer._parameters["bias"], "none", [], "")

    def silu(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self._run(x, self.weight(layer), layer._parameters["bias"], "swish", [], "")

    def mul(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        return self._binary(x, other, self.weight(layer), layer._parameters["bias"], "mul")

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        return self._binary(x, other, self.weight(layer), layer._parameters["bias"], "add")


class FewLinear(TorchLinear):
    """The same for a few lines, by compiled ops over weights where they lie: four lines cost what one does.

    A line's products do not depend on how many lines there are.
    """

    def __init__(self, ops: ProductOps) -> None:
        self._ops, self.most = ops, ops.most

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return self._ops.linear(x, parameters(layer))

    def heads(self, x: torch.Tensor, attention: nn.Module) -> tuple[torch.Tensor, ...]:
        parts = [parameters(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        return self._ops.linear(x, *parts).split([weight.shape[0] for weight, _ in parts], -1)

    def gated(self, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        return self._ops.gated(x, parameters(mlp.gate_proj), parameters(mlp.up_proj))

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        return self._ops.linear(x, parameters(layer), add=other)


def parameters(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer._parameters["weight"], layer._parameters["bias"]


# Layers of one block that read the same input, in the order in which their outputs are wanted.
JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


class PackedLinear(OneDnnLinear, Watched):
    """The same over copies of the weights in oneDNN's own order, which saves reordering them at every product.

    Args:
        layers: to copy.
        blocks: attentions and gated MLPs whose first products become one.
        ops: what follows the MLPs' joined product.
    """

    def __init__(self, layers: list[nn.Linear], blocks: Sequence[nn.Module] = (), ops: NativeOps | None = None) -> None:
        super().__init__()
        self._pack, self._ops = torch.ops.mkldnn._reorder_linear_weight, ops
        joined = [(block, [getattr(block, name) for name in JOINED if hasattr(block, name)]) for block in blocks]
        seen = [*layers, *(part for _, parts in joined for part in parts)]
        self.watch(seen)
        self._packed = {layer: self._pack(layer.weight.detach()) for layer in layers}
        # One buffer for all: a heap does not fill the hole that the last one left.
        sizes = [sum(part.weight.numel() for part in parts) for _, parts in joined]
        scratch = seen[0].weight.new_empty(max(sizes, default=0))
        self._joined = {block: self._join(parts, scratch) for block, parts in joined}

    def _join(
        self, parts: list[nn.Linear], scratch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
        shape = sum(part.out_features for part in parts), parts[0].in_features
        weight = scratch[: shape[0] * shape[1]].view(shape)
        torch.cat([part.weight.detach() for part in parts], out=weight)
        bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
        return self._pack(weight), bias, [part.out_features for part in parts]

    def weight(self, layer: nn.Linear) -> torch.Tensor:
        packed = self._packed.get(layer)
        return layer._parameters["weight"] if packed is None else packed

    def heads(self, x: torch.Tensor, attention: nn.Module) -> tuple[torch.Tensor, ...]:
        weight, bias, sizes = self._joined[attention]
        return self._run(x, weight, bias, "none", [], "").split(sizes, -1)

    def gated(self, x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
        if mlp not in self._joined:
            return super().gated(x, mlp)
        weight, bias, _ = self._joined[mlp]
        return self._ops.silu_mul(self._run(x, weight, bias, "none", [], ""))


def linear_backend(weight: torch.Tensor, backend: str = "auto") -> TorchLinear:
    """oneDNN for float32 on a CPU where torch has it and it gives the right numbers, else torch."""
    if weight.device.type != "cpu" and runs_triton(weight.device.type, backend):
        return TritonLinear()
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    return OneDnnLinear() if fits and _onednn_is_right() else TorchLinear()


def few_backend(weight: torch.Tensor, backend: str) -> FewLinear | None:
    """Compiled products of a few lines, where they serve weights like this one and `backend` is not `torch`."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and backend != "torch"
    ops = product_ops() if fits else None
    return None if ops is None else FewLinear(ops)


@lru_cache(maxsize=1)
def _onednn_is_right() -> bool:
    """Try each operation once: they are private to torch, and may change or be absent."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        layer = nn.utils.skip_init(nn.Linear, 24, 16)  # else torch's generator would advance
        x, other = torch.linspace(-1, 1, 72).view(3, 24), torch.linspace(-2, 1, 48).view(3, 16)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 384).view(16, 24))
            layer.bias.copy_(torch.linspace(-1, 2, 16))
            for ops in (OneDnnLinear(), PackedLinear([layer])):
                for name, rest in (("linear", ()), ("silu", ()), ("mul", (other,)), ("add", (other,))):
                    wanted = getattr(TorchLinear(), name)(x, layer, *rest)
                    torch.testing.assert_close(getattr(ops, name)(x, layer, *rest), wanted, atol=1e-4, rtol=1e-4)
    except (AttributeError, RuntimeError, AssertionError):
        return False
    return True
