"""Drafts on a CPU: a forward over a few lines and the choice behind it in one call, `few_drafts` of `csrc/drafts.c`.

A small model computes a line in less time than Python needs to say which: what stays the same over the forwards of one
step is said once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hf_paged.kernels.native import address, native_ops
from hf_paged.kernels.native_blocks import FewModel
from hf_paged.kernels.native_sampling import present

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
IDS, POSITIONS, SLOTS, LINE_OF, CONTEXT, VISIBLE, BASE = range(7)  # fields of a line

# A line: token, place in its text, slot, row of the page table, how many slots it sees, and what `TreeMask` says.
Line = tuple[int, int, int, int, int, int, int]
Chosen = tuple[list[list[int]], list[list[float]]]  # tokens and odds of each line, best first


class NativeDrafts:
    """The likeliest tokens behind lines of a few rows.

    Args:
        model: whose weights do not change as long as this is used; it must name frequencies.
        page_size: of its pages.
    """

    def __init__(self, model: FewModel, page_size: int) -> None:
        self.model = model
        self._lines = np.zeros((7, model.most), np.int64)
        self._wanted = np.zeros(model.most, np.int64)
        at = [address(self._lines) + self._lines.strides[0] * field for field in range(7)]
        self._sight = np.array([0, at[LINE_OF], at[CONTEXT], 0, at[VISIBLE], at[BASE]], np.int64)
        self._inputs = np.array([at[IDS], at[POSITIONS], at[SLOTS], 0, address(self._wanted), 0], np.int64)
        self._shape = np.array([0, *model.sizes, page_size, 0], np.int64)
        self._settings = np.zeros(6, np.int64)
        self._run, self._run_chain = _few_drafts()
        arrays = *model.places, address(self._shape), address(self._inputs)
        self._at = *arrays, None, None, model.turn, model.scale, model.eps
        self._sight_at, self._settings_at = address(self._sight), address(self._settings)

    def begin(self, parameters: tuple[np.ndarray, ...]) -> None:
        """Take other rows: an entry each, as `SamplingOps` takes them."""
        self._parameters = parameters
        self._settings[:] = [address(part) for part in parameters]

    def __call__(
        self, lines: Sequence[Line], wanted: Sequence[int], table: np.ndarray, ahead: int, width: int
    ) -> Chosen:
        """What `SamplingOps.likely` says of the wanted lines; KV of all is stored.

        Args:
            lines: at most `model.most`. wanted: their indices.
            table: int64 `[rows, pages]`.
            ahead: tokens that the wanted lines stand behind those whose places the parameters name.
        """
        self._place(lines, wanted, table)
        tokens, odds = np.empty((len(wanted), width), np.int64), np.empty((len(wanted), width), np.float32)
        if self._run(address(tokens), address(odds), width, self._settings_at, ahead, *self._at):
            raise MemoryError(f"no memory for {len(lines)} lines of {self.model.sizes[0]} numbers")
        return present(tokens, odds)

    def chain(
        self, lines: Sequence[Line], table: np.ndarray, slots: Sequence[int], width: int, odds: np.ndarray, least: float
    ) -> Chosen:
        """The same of the last of `lines`, which are one row's, then of the likeliest token behind it, and so on.

        Args:
            slots: of the tokens to come: at most one more is given.
            odds: float32, that a likeliest token is the right one, by its probability: in so many equal steps.
            least: product of the likeliest tokens' odds under which nothing more is asked for.
        """
        self._place(lines, [len(lines) - 1], table)
        deepest, at, depth = len(slots) + 1, np.array([*slots, 0], np.int64), ctypes.c_int64()
        tokens, probs = np.empty((deepest, width), np.int64), np.empty((deepest, width), np.float32)
        rule = deepest, least, address(odds), len(odds), address(at), ctypes.byref(depth)
        if self._run_chain(address(tokens), address(probs), width, self._settings_at, *rule, *self._at):
            raise MemoryError(f"no memory for {len(lines)} lines of {self.model.sizes[0]} numbers")
        return present(tokens[: depth.value], probs[: depth.value])

    def _place(self, lines: Sequence[Line], wanted: Sequence[int], table: np.ndarray) -> None:
        """What the compiled call reads."""
        count, n = len(lines), len(wanted)
        self._lines[:, :count] = np.array(lines, np.int64).T
        self._wanted[:n] = wanted
        self._shape[0], self._shape[-1] = count, table.shape[1]
        self._inputs[3], self._inputs[5] = address(table), n
        self.model.blocks[:, -1] = self._sight_at


@lru_cache(maxsize=1)
def _few_drafts() -> tuple[ctypes._CFuncPtr, ctypes._CFuncPtr]:
    library, model = native_ops().library, [_P, _P, _I, _P, _P, _P, _P, _F, _F, _F]
    library.few_drafts.argtypes = [_P, _P, _I, _P, _I, *model]
    library.few_chain.argtypes = [_P, _P, _I, _P, _I, _F, _P, _I, _P, _P, *model]
    return library.few_drafts, library.few_chain
