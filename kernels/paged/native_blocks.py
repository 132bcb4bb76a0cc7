"""Whole decoder blocks over a few lines in one compiled call: `csrc/blocks.c`. Optional.

For a request alone, the calls from Python to a forward's ops take longer than the ops.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch

from hf_paged.kernels.native import address, native_ops
from hf_paged.kernels.rows import PagedRows
from hf_paged.kernels.torch_path import grouped_step, seen_by

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# Of a block, in the order of `block` in `blocks.c`: weight and bias of each, weights of norms, pages, what is seen.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("norm", "mlp_norm", "q_norm", "k_norm")
FIELDS = 2 * len(LINEARS) + len(NORMS) + 3


class BlockOps:
    """Pre-norm blocks of rotary attention and gated MLP; all tensors float32 on the CPU, contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.few_blocks
        self._run.argtypes = [_P, _P, _I] + [_P] * 5 + [_F, _F]

    def __call__(
        self,
        hidden: torch.Tensor,
        blocks: np.ndarray,
        windows: list[int | None],
        rows: PagedRows,
        rotation: tuple[torch.Tensor, torch.Tensor],
        sizes: tuple[int, int, int, int],
        scale: float,
        eps: float,
    ) -> None:
        """`hidden` `[lines, width]` becomes what leaves the blocks; KV of its tokens is stored in `rows.slots`.

        Args:
            blocks: int64 `[blocks, FIELDS]`, addresses, but for what is seen. windows: of each block.
            rows: of the step; every line is a query of it.
            rotation: cosines and sines `[lines, head_dim]`.
            sizes: width of the MLP, heads, KV heads, head_dim.
            scale: of products of queries and keys. eps: of all norms.

        Raises:
            MemoryError: there was none for the lines' numbers on their way.
        """
        sights = {window: _sight(rows, window) for window in set(windows)}
        blocks[:, -1] = [address(sights[window]) for window in windows]
        table = rows.page_table
        shape = np.array([*hidden.shape, *sizes, rows.page_size, table.shape[1]], np.int64)
        cos, sin = rotation
        tensors = cos.data_ptr(), sin.data_ptr(), rows.slots.data_ptr()
        at = address(blocks), len(blocks), address(shape)
        if self._run(hidden.data_ptr(), *at, *tensors, address(table), scale, eps):
            raise MemoryError(f"no memory for {len(hidden)} lines of {hidden.shape[1]} numbers")


def _sight(rows: PagedRows, window: int | None) -> np.ndarray:
    """The fields of `sight` in `blocks.c`. What they point to lives as long as `rows`."""

    def make() -> np.ndarray:
        step = grouped_step(rows, window)
        if step is not None:
            return np.array([step.address, 0, 0, 0, 0, 0], np.int64)
        seen = seen_by(rows, window)
        arrays = seen.line_of, seen.context, seen.begin, seen.visible, seen.base
        return np.array([0, *(address(array) or 0 for array in arrays)], np.int64)

    return rows.derived(("sight", window), make)


@lru_cache(maxsize=1)
def block_ops() -> BlockOps | None:
    """The compiled ops, or None where there are none."""
    ops = native_ops()
    return None if ops is None else BlockOps(ops.library)
