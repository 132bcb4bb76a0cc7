"""CPU ops compiled on first use by the machine's own C compiler. Optional: without one, the torch ops do the same.

They run on the threads of torch's own OpenMP, so that `torch.set_num_threads` governs them and no second pool competes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import lru_cache

import numpy as np
import torch

from hf_paged.kernels.groups import Groups
from hf_paged.kernels.native_build import SECONDS, built, compiler_of, openmp_of_torch
from hf_paged.kernels.seen import Seen

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_Byte = ctypes.c_char


def address(array: np.ndarray | None) -> int | None:
    """Where the numbers of an array lie."""
    if array is None:
        return None
    try:
        return ctypes.addressof(_Byte.from_buffer(array))  # a third of the time of the other ways
    except (TypeError, ValueError):  # it is empty, in pieces, or not to be written
        return array.__array_interface__["data"][0]


class GroupedStep:
    """What all layers of a step tell `NativeOps.grouped` alike, made once."""

    def __init__(self, table: np.ndarray, seen: Seen, groups: Groups) -> None:
        self.groups = groups
        arrays = (table, seen.line_of, seen.context, groups.own, groups.members, groups.part_start, groups.parts)
        arrays = (*arrays, groups.segments, seen.visible, seen.base)
        numbers = table.shape[1], len(seen.line_of), len(groups.segments), len(groups.members)
        # The fields of `step` in `grouped.c`, all of 64 bits.
        self._fields = np.array([*(address(array) or 0 for array in arrays), *numbers], np.int64)
        self._alive = arrays
        self.address = address(self._fields)


class NativeOps:
    """The compiled ops; all tensors are float32 and on the CPU, contiguous where nothing else is said.

    Attributes:
        amx: whether the processor multiplies tiles of bfloat16, and may be used so.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.amx = library, bool(library.tiles_by_amx(1))
        self._decode, self._norm, self._rotate = library.decode_attention, library.rms_norm, library.rotate_and_store
        self._decode.argtypes = [_P, _P, _I] + [_P] * 3 + [_I, _P, _P] + [_I] * 6 + [_F, _P, _F, _P, _P, _P]
        self._grouped = library.grouped_attention
        self._grouped.argtypes = [_P, _P, _I] + [_P] * 3 + [_I] * 5 + [_F, _F, _P]
        self._norm.argtypes, self._norm.restype = [_P, _P, _P, _F, _I, _I], None
        self._silu_mul = library.silu_mul
        self._silu_mul.argtypes, self._silu_mul.restype = [_P, _P, _I, _I], None
        self._rotate.argtypes, self._rotate.restype = [_P] * 8 + [_I] * 8, None

    def attention(self, query, key_pages, value_pages, table, seen: Seen, scale, softcap, sinks):
        """Each query by itself: `[queries, heads, dim]` → `[queries, heads, value_dim]`.

        Query `i` reads line `seen.line_of[i]` of `table` (int64 `[lines, width]`).
        """
        rows, heads, dim = query.shape
        _, kv_heads, size, value_dim = value_pages.shape
        query, out = _lines(query), query.new_empty(rows, heads, value_dim)
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        failed = self._decode(
            out.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            key_pages.data_ptr(),
            value_pages.data_ptr(),
            address(table),
            table.shape[1],
            address(seen.line_of),
            address(seen.context),
            rows,
            heads,
            kv_heads,
            dim,
            value_dim,
            size,
            scale,
            address(seen.begin),
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            address(seen.visible),
            address(seen.base),
        )
        if failed:
            raise MemoryError(f"no memory for the scores of {rows} rows of up to {int(seen.context.max())} tokens")
        return out

    def grouped(self, query, key_pages, value_pages, step: GroupedStep, scale, softcap, sinks):
        """As `attention`, with the slots of groups computed for many queries at once. Without windows."""
        rows, heads, dim = query.shape
        _, kv_heads, size, value_dim = value_pages.shape
        query, out = _lines(query), query.new_empty(rows, heads, value_dim)
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        failed = self._grouped(
            out.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            key_pages.data_ptr(),
            value_pages.data_ptr(),
            step.address,
            heads,
            kv_heads,
            dim,
            value_dim,
            size,
            scale,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for the parts of {rows} rows, {len(step.groups.members)} of them shared")
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Lines of `x` `[..., width]` over their root mean square, times `weight` `[width]`."""
        x, out = x.contiguous(), torch.empty(x.shape)
        width = weight.shape[0]
        self._norm(out.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width)
        return out

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each line of `x` `[lines, 2 * width]`, times the second half: `[lines, width]`."""
        lines, width = x.shape[0], x.shape[1] // 2
        out = torch.empty(lines, width)
        self._silu_mul(out.data_ptr(), x.data_ptr(), lines, width)
        return out

    def rotate_and_store(self, query, key, value, cos, sin, key_pages, value_pages, slots) -> None:
        """Rotate `query` and `key` in place by `cos` and `sin` `[tokens, dim]`, and store `key` and `value`.

        All three are `[tokens, heads, dim]`, the heads of a token one after another.
        """
        tokens, heads, dim = query.shape
        tensors = (query, key, value, cos, sin, key_pages, value_pages, slots)
        lines = (query.stride(0), key.stride(0), value.stride(0))
        self._rotate(*(t.data_ptr() for t in tensors), *lines, tokens, heads, key.shape[1], dim, key_pages.shape[2])


def _lines(x: torch.Tensor) -> torch.Tensor:
    """`x` `[tokens, heads, dim]` with the heads of a token one after another; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def matrix_lines(x: torch.Tensor) -> torch.Tensor:
    """`x` `[lines, n]` with the numbers of a line one after another; lines may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def native_ops() -> NativeOps | None:
    """The compiled ops, or None where there are none (`native_status` says why)."""
    return native_status()[0]


@lru_cache(maxsize=1)
def native_status() -> tuple[NativeOps | None, str]:
    """The compiled ops or None, and where they come from or why there are none."""
    if os.environ.get("HF_PAGED_NATIVE", "1") == "0":
        return None, "HF_PAGED_NATIVE is 0"
    try:
        compiler, runtime = compiler_of(dict(os.environ)), openmp_of_torch()
        if not compiler or runtime is None:
            return None, "there is no C compiler" if not compiler else "torch runs without GNU OpenMP"
        path = built(compiler)
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)  # the symbols that `path` leaves open
        try:
            ops = NativeOps(ctypes.CDLL(str(path)))
        except OSError:
            path.unlink(missing_ok=True)  # no library: the next process may have a better compiler
            raise
        return ops, f"compiled by {' '.join(compiler)}" + (", some products by AMX" if ops.amx else "")
    except subprocess.TimeoutExpired:
        return None, f"compiling took more than {SECONDS} seconds"
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return None, f"compiling failed: {output.strip().splitlines()[0] if output.strip() else error!r}"
