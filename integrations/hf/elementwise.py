"""What stands between the products of a lean forward: norms, rotation, storing KV. In torch, or compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hf_paged.kernels import runs_triton, with_fallback, write_kv
from hf_paged.kernels.fp8 import FP8
from hf_paged.kernels.native import NativeOps, native_ops
from hf_paged.kernels.rows import PagedRows

Pages = tuple[torch.Tensor, torch.Tensor]
Norms = tuple[nn.Module, nn.Module] | None  # of each head's query, and key


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
        self, query, key, value, rotation, pages: Pages, slots, rows: PagedRows, norms: Norms = None
    ) -> tuple[torch.Tensor, ...]:
        """Rotate queries and keys `[tokens, heads, head_dim]` (Su et al. 2021), store keys and values.

        Where there are `norms`, they come first.
        `slots` may have more lines than `rows.slots`, for tokens that are there to fill up.

        Returns:
            the rotated queries and keys.
        """
        query, key = self._heads_normed(query, key, norms)
        cos, sin = rotation
        half = query.shape[-1] // 2
        query = torch.addcmul(query * cos, query.roll(half, -1), sin)
        key = torch.addcmul(key * cos, key.roll(half, -1), sin)
        n = len(rows.slots)
        write_kv(key[:n], value[:n], *pages, rows)
        return query, key

    def _heads_normed(self, query, key, norms: Norms) -> tuple[torch.Tensor, torch.Tensor]:
        if norms is None:
            return query, key
        return self.rms_norm(query, norms[0]), self.rms_norm(key, norms[1])


class NativeElementwise(TorchElementwise):
    """Compiled, for float32 on a CPU: each one pass over its tensors."""

    def __init__(self, ops: NativeOps) -> None:
        self.ops = ops

    def rms_norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self.ops.rms_norm(x, norm._parameters["weight"], norm.variance_epsilon)

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos.contiguous(), sin.contiguous()

    def rotate_and_store(
        self, query, key, value, rotation, pages: Pages, slots, rows: PagedRows, norms: Norms = None
    ) -> tuple[torch.Tensor, ...]:
        if pages[0].dtype != torch.float32:
            rotation = super().rotation(*rotation)
            return super().rotate_and_store(query, key, value, rotation, pages, slots, rows, norms)
        query, key = self._heads_normed(query, key, norms)
        self.ops.rotate_and_store(query, key, value, *rotation, *pages, slots)
        return query, key


class TritonElementwise(TorchElementwise):
    """By Triton kernels, on a GPU: each one pass over its tensors."""

    def rms_norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        from hf_paged.kernels.rms_norm import rms_norm

        weight = norm._parameters["weight"]
        if not runs_triton(x.device.type, "auto") or x.dim() != 2 or x.stride(1) != 1 or x.dtype != weight.dtype:
            return super().rms_norm(x, norm)
        return with_fallback(
            rms_norm, lambda *_: super(TritonElementwise, self).rms_norm(x, norm), x, weight, norm.variance_epsilon
        )

    def rotate_and_store(
        self, query, key, value, rotation, pages: Pages, slots, rows: PagedRows, norms: Norms = None
    ) -> tuple[torch.Tensor, ...]:
        from hf_paged.kernels.rotate import rotate_and_store

        def instead(*_):
            return super(TritonElementwise, self).rotate_and_store(
                query, key, value, rotation, pages, slots, rows, norms
            )

        if not self._fused(query, key, value, pages):
            return instead()
        given = None
        if norms is not None:
            given = tuple(part for norm in norms for part in (norm._parameters["weight"], norm.variance_epsilon))
        # The other half of a rotation is its first with its sign changed.
        cos, sin = (part[:, 0] for part in rotation)
        return with_fallback(rotate_and_store, instead, query, key, value, cos, sin, *pages, slots, given)

    def _fused(self, query, key, value, pages: Pages) -> bool:
        dim = query.shape[-1]
        packed = all(part.stride(2) == 1 and part.stride(1) == dim for part in (query, key, value))
        if not packed or value.shape != key.shape or not runs_triton(query.device.type, "auto"):
            return False
        from hf_paged.kernels.triton_path import reads

        return key.dtype == pages[0].dtype or (pages[0].dtype == FP8 and reads(FP8, query.device))


def elementwise_backend(weight: torch.Tensor, backend: str) -> TorchElementwise:
    """Triton's kernels on a GPU, compiled ops where they serve a model of such weights; `torch`: neither."""
    if weight.device.type != "cpu" and runs_triton(weight.device.type, backend):
        return TritonElementwise()
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and backend == "auto"
    ops = native_ops() if fits else None
    return TorchElementwise() if ops is None else NativeElementwise(ops)
