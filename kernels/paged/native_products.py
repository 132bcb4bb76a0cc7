"""Compiled products of a few lines on a CPU, over weights where they lie: `csrc/products.c`. Optional."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from hf_paged.kernels.native import matrix_lines, native_ops

_I, _P = ctypes.c_int64, ctypes.c_void_p
FEW = 12  # lines up to which these beat a matrix library, which wants more of them
SMALL_BYTES = 64 * 2**20  # weights of a model of whose products a library's calls take a large part

Layer = tuple[torch.Tensor, torch.Tensor | None]  # weight [out, in] and bias [out]


class ProductOps:
    """Products of `x` `[lines, in]` with weights `[out, in]`; all float32 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear, self._gated = library.few_linear, library.few_gated
        self._linear.argtypes, self._linear.restype = [_P, _P, _I, _I, _I, _P] + [_P, _P, _I] * 3, None
        library.vector_lanes.argtypes, library.vector_lanes.restype = [], _I
        self._lanes = library.vector_lanes()
        self._gated.argtypes, self._gated.restype = [_P, _P, _I, _I, _I] + [_P] * 4 + [_I], None

    def most(self, nbytes: int) -> int:
        """Lines up to which these are faster, for a model whose weights have so many bytes (measured on two cores)."""
        return max(FEW, 3 * self._lanes) if nbytes <= SMALL_BYTES else FEW

    def linear(self, x: torch.Tensor, *layers: Layer, add: torch.Tensor | None = None) -> torch.Tensor:
        """`x` through up to three layers side by side, `[lines, sum of out]`, plus `add` of that shape."""
        x, kept = matrix_lines(x), [_whole(layer) for layer in layers]
        widths = [weight.shape[0] for weight, _ in kept]
        out = x.new_empty(x.shape[0], sum(widths))
        if add is not None:
            add = add.contiguous()
        places = [part for layer, rows in zip(kept, widths, strict=True) for part in (*_addresses(layer), rows)]
        places += [None, None, 0] * (3 - len(kept))
        at = None if add is None else add.data_ptr()
        self._linear(out.data_ptr(), x.data_ptr(), x.stride(0), *x.shape, at, *places)
        return out

    def gated(self, x: torch.Tensor, gate: Layer, up: Layer) -> torch.Tensor:
        """silu(gate(x)) * up(x)"""
        x, gate, up = matrix_lines(x), _whole(gate), _whole(up)
        rows = gate[0].shape[0]
        out = x.new_empty(x.shape[0], rows)
        places = (*_addresses(gate), *_addresses(up), rows)
        self._gated(out.data_ptr(), x.data_ptr(), x.stride(0), *x.shape, *places)
        return out


def _whole(layer: Layer) -> Layer:
    weight, bias = layer
    return weight if weight.is_contiguous() else weight.contiguous(), bias if bias is None else bias.contiguous()


def _addresses(layer: Layer) -> tuple[int, int | None]:
    weight, bias = layer
    return weight.data_ptr(), None if bias is None else bias.data_ptr()


@lru_cache(maxsize=1)
def product_ops() -> ProductOps | None:
    """The compiled ops, or None where there are none."""
    ops = native_ops()
    return None if ops is None else ProductOps(ops.library)
