"""Places in texts chained by what stands before them, by a compiled op: `csrc/chains.c`. Optional."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hf_paged.kernels.native import address, native_ops


class ChainOp:
    """Adds places to chains.

    Args:
        heads, before: int64 `[size]` of each kind of chain, a power of two; they must stay where they are.
    """

    def __init__(self, heads: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> None:
        self._kept, self._mask = (heads, before), len(heads[0]) - 1
        self._at = [np.array(list(map(address, part)), np.int64) for part in (heads, before)]
        self._run = _chain_places()

    def __call__(self, tokens: Sequence[int], first: int, begin: int, end: int, count: int) -> None:
        """Places `begin` to `end` of a text are entries from `count` on.

        Args:
            tokens: of the text, from place `first` to `end`; six before `begin`, if there are so many.
        """
        tokens = np.array(tokens, np.int64)
        self._run(address(tokens), first, begin, end, count, self._mask, *map(address, self._at))


@lru_cache(maxsize=1)
def _chain_places() -> ctypes._CFuncPtr:
    run = native_ops().library.chain_places
    run.argtypes, run.restype = [ctypes.c_void_p] + [ctypes.c_int64] * 5 + [ctypes.c_void_p] * 2, None
    return run


def chain_op(heads: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> ChainOp | None:
    """The compiled op over these chains, or None where there is none."""
    return None if native_ops() is None else ChainOp(heads, before)
