"""Compiled products with weights in tiles of bfloat16 on a CPU: `csrc/tiles.c`. Optional."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from hf_paged.kernels.native import NativeOps, matrix_lines, native_ops
from hf_paged.kernels.native_products import Layer
from hf_paged.kernels.room import fresh_zeros

_I, _P = ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True, eq=False)
class Tiles:
    """Layers of one input as tiles.

    Attributes:
        weight: uint16 `[numbers]`. bias: float32 `[outputs]` of all layers, or None.
        inputs: of each. outputs: of all; of one where they are gates and ups.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    inputs: int
    outputs: int


class TileOps:
    """Products of `x` `[lines, in]`, float32, with weights `[out, in]` that are exact in bfloat16.

    They are as accurate as in float32, and a line's do not depend on how many lines there are.

    Attributes:
        by_amx: whether the processor multiplies tiles as such.
    """

    def __init__(self, ops: NativeOps) -> None:
        library, self.by_amx = ops.library, ops.amx
        self._tile, self._size, self._linear = library.tile_weights, library.tiled_size, library.tile_linear
        self._tile.argtypes = [_P, _P] + [_I] * 5
        self._size.argtypes, self._size.restype = [_I] * 3, _I
        self._linear.argtypes = [_P, _P, _I, _I, _I, _P, _P, _P, _I, _I]
        self._by_amx, self._lanes = library.tiles_by_amx, library.vector_lanes()

    @property
    def most(self) -> int:
        """Lines up to which these are faster than a matrix library's: with AVX-512 any number. (On an AMD processor 2.4
        times, where torch's library knows of AVX2 alone.)"""
        return 1 << 60 if self.by_amx or self._lanes >= 16 else 8 * self._lanes

    def use_amx(self, wanted: bool) -> bool:
        """Multiply tiles as such if that is wanted and can be; returns whether it is done."""
        self.by_amx = bool(self._by_amx(wanted))
        return self.by_amx

    @staticmethod
    def likely(layers: Sequence[Layer]) -> bool:
        """Whether layers may be copied side by side, by a look at the first numbers of each."""
        alike = len({bias is None for _, bias in layers}) == 1
        return alike and all(torch.equal(w[0], w[0].bfloat16().float()) for w, _ in layers)

    def size(self, layers: Sequence[Layer], gated: bool = False) -> int:
        """Numbers of their tiles."""
        return self._size(_outputs(layers, gated), layers[0][0].shape[1], gated)

    @staticmethod
    def room(size: int) -> torch.Tensor:
        """Zeros for so many numbers of tiles."""
        return fresh_zeros(2 * size).view(torch.uint16)

    def tiles(self, layers: Sequence[Layer], gated: bool = False, out: torch.Tensor | None = None) -> Tiles | None:
        """Copies of layers side by side, or of a gate and an up; None where a weight is not exact in bfloat16, or some
        have a bias and others have none.

        Args:
            out: of `room`, where they go. Default: they get their own.
        """
        if not self.likely(layers):
            return None
        inputs, widths = layers[0][0].shape[1], [weight.shape[0] for weight, _ in layers]
        outputs, out = _outputs(layers, gated), self.room(self.size(layers, gated)) if out is None else out
        for index, (weight, _) in enumerate(layers):
            kept = weight.detach().contiguous()
            places = (0, 2, index) if gated else (sum(widths[:index]), 1, 0)
            if not self._tile(out.data_ptr(), kept.data_ptr(), *kept.shape, *places):
                return None
        biases = [bias for _, bias in layers if bias is not None]
        return Tiles(out, torch.cat([bias.detach() for bias in biases]) if biases else None, inputs, outputs)

    def linear(
        self, x: torch.Tensor, tiles: Tiles, add: torch.Tensor | None = None, gated: bool = False
    ) -> torch.Tensor:
        """`x` through the layers, `[lines, outputs]`, plus `add` of that shape; if gated, silu(gate(x)) * up(x).

        Raises:
            MemoryError: there was none for the parts of `x`.
        """
        x, add = matrix_lines(x), None if add is None else add.contiguous()
        out = x.new_empty(x.shape[0], tiles.outputs)
        added, bias = (None if part is None else part.data_ptr() for part in (add, tiles.bias))
        places = added, tiles.weight.data_ptr(), bias, tiles.outputs, gated
        if self._linear(out.data_ptr(), x.data_ptr(), x.stride(0), *x.shape, *places):
            raise MemoryError(f"no memory for the parts of {x.shape[0]} lines of {x.shape[1]} numbers")
        return out


def _outputs(layers: Sequence[Layer], gated: bool) -> int:
    """Of layers side by side; of one where they are gates and ups."""
    return layers[0][0].shape[0] if gated else sum(weight.shape[0] for weight, _ in layers)


@lru_cache(maxsize=1)
def tile_ops() -> TileOps | None:
    """The compiled ops, or None where there are none."""
    ops = native_ops()
    return None if ops is None else TileOps(ops)
