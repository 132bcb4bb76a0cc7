"""Linear layers with what follows them: plain torch, or oneDNN's fused ones where they are there and right.

On CPUs whose vendor's BLAS is not the one that torch was built with, float32 products through oneDNN take a half to a
third of the time, and one to four rows cost the same; it reads the weights where they are, without a packed copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TorchLinear:
    """Each method applies `layer` to `x` `[tokens, in]` and gives `[tokens, out]`."""

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        p = layer._parameters
        return F.linear(x, p["weight"], p["bias"])

    def silu(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """silu(layer(x))"""
        return F.silu(self.linear(x, layer))

    def mul(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        """layer(x) * other"""
        return self.linear(x, layer).mul_(other)

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        """layer(x) + other"""
        return self.linear(x, layer).add_(other)


class OneDnnLinear(TorchLinear):
    """The same through oneDNN, with the second operation inside the product."""

    def __init__(self) -> None:
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def linear(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        p = layer._parameters
        return self._run(x, p["weight"], p["bias"], "none", [], "")

    def silu(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        p = layer._parameters
        return self._run(x, p["weight"], p["bias"], "swish", [], "")

    def mul(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        p = layer._parameters
        return self._binary(x, other, p["weight"], p["bias"], "mul")

    def add(self, x: torch.Tensor, layer: nn.Linear, other: torch.Tensor) -> torch.Tensor:
        p = layer._parameters
        return self._binary(x, other, p["weight"], p["bias"], "add")


def linear_backend(weight: torch.Tensor) -> TorchLinear:
    """oneDNN for float32 on a CPU where torch has it and it gives the right numbers, else torch."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return TorchLinear()
    try:
        fused, layer = OneDnnLinear(), nn.utils.skip_init(nn.Linear, 24, 16)  # else torch's generator would advance
        x, other = torch.linspace(-1, 1, 72).view(3, 24), torch.linspace(-2, 1, 48).view(3, 16)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 384).view(16, 24))
            layer.bias.copy_(torch.linspace(-1, 2, 16))
            for name, rest in (("linear", ()), ("silu", ()), ("mul", (other,)), ("add", (other,))):
                wanted = getattr(TorchLinear(), name)(x, layer, *rest)
                torch.testing.assert_close(getattr(fused, name)(x, layer, *rest), wanted, atol=1e-4, rtol=1e-4)
    except (AttributeError, RuntimeError, AssertionError):  # private ops: they may change or be absent
        return TorchLinear()
    return fused
