"""What stands between the products of a lean forward: norms, rotation, storing KV. In torch, or compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_paged.kernels import write_kv
from hf_paged.kernels.native import NativeOps, native_ops
from hf_paged.kernels.rows import PagedRows

Pages = tuple[torch.Tensor, torch.Tensor]


class TorchElementwise:
    """In torch, for every device and dtype."""

    def rms_norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Zhang and Sennrich, NeurIPS 2019; over the last axis, in float32 and back, as the modules do."""
        weight = norm._parameters["weight"]
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)
        return weight * F.rms_norm(x.float(), weight.shape, None, norm.variance_epsilon).to(x.dtype)

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Once a step: what `rotate_and_store` takes, from cosines and sines `[tokens, head_dim]`."""
        half = cos.shape[-1] // 2
        return cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), -1)[:, None]

    def rotate_and_store(
        self, query, key, value, rotation, pages: Pages, slots, rows: PagedRows
    ) -> tuple[torch.Tensor, ...]:
        """Rotate queries and keys `[tokens, heads, head_dim]` (Su et al. 2021), store keys and values.

        `slots` may have more lines than `rows.slots`, for tokens that are there to fill up.

        Returns:
            the rotated queries and keys.
        """
        cos, sin = rotation
        half = query.shape[-1] // 2
        query = torch.addcmul(query * cos, query.roll(half, -1), sin)
        key = torch.addcmul(key * cos, key.roll(half, -1), sin)
        n = len(rows.slots)
        write_kv(key[:n], value[:n], *pages, rows)
        return query, key


class NativeElementwise(TorchElementwise):
    """Compiled, for float32 on a CPU: each one pass over its tensors."""

    def __init__(self, ops: NativeOps) -> None:
        self.ops = ops

    def rms_norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self.ops.rms_norm(x, norm._parameters["weight"], norm.variance_epsilon)

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos.contiguous(), sin.contiguous()

    def rotate_and_store(
        self, query, key, value, rotation, pages: Pages, slots, rows: PagedRows
    ) -> tuple[torch.Tensor, ...]:
        self.ops.rotate_and_store(query, key, value, *rotation, *pages, slots)
        return query, key


def elementwise_backend(weight: torch.Tensor, backend: str) -> TorchElementwise:
    """Compiled ops where they serve a model of such weights and `backend` is `auto`."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and backend == "auto"
    ops = native_ops() if fits else None
    return TorchElementwise() if ops is None else NativeElementwise(ops)
