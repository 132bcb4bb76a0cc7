"""Decode steps on a CPU, several in one compiled call: `few_steps` of `csrc/steps.c`. Optional."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain

import numpy as np
import torch

from hf_paged.kernels.native import address, native_ops
from hf_paged.kernels.native_blocks import FewModel, see_all
from hf_paged.kernels.rows import PagedRows

_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class StepsOp:
    """Several steps of rows of one token each."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.few_steps
        self._run.argtypes = [_P, _P, _P, _P, _I, _P, _P, _P, _P, _P, _P, _I, _P, _P, _F, _F, _F]

    def __call__(
        self,
        model: FewModel,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: PagedRows,
        parameters: Sequence[np.ndarray],
        left: Sequence[int],
        stops: Sequence[Sequence[int]],
        steps: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64 and the largest scores float32, both `[steps done, rows]`, and seconds float64 `[steps done]`.

        No step follows one in which a row ends. What the arguments say of the first step is moved along. KV of all
        tokens but the last ones is stored.

        Args:
            model: which must name frequencies, and of which no window hides anything.
            token_ids, positions: int64 `[rows]`, the last token of each row.
            rows: of the first step; its page table has pages for all.
            parameters: as `SamplingOps` takes them.
            left: tokens that each row may have yet. stops: ids of tokens that end it.

        Raises:
            IndexError: a token that the model does not have.
            MemoryError: there was none for the lines' numbers on their way.
        """
        count = len(token_ids)
        tokens, tops = np.empty((steps, count), np.int64), np.empty((steps, count), np.float32)
        seconds, done = np.empty(steps), ctypes.c_int64()
        begin, ids = np.array([0, *accumulate(map(len, stops))]), np.array([*chain(*stops), 0], np.int64)
        numbers = np.array(left, np.int64), begin, ids
        limits = np.array([address(part) for part in numbers], np.int64)
        settings, wanted = np.array([address(part) for part in parameters], np.int64), np.arange(count)
        shape = np.array([count, *model.sizes, rows.page_size, rows.page_table.shape[1]], np.int64)
        packed = token_ids.data_ptr(), positions.data_ptr(), rows.slots.data_ptr()
        inputs = np.array([*packed, address(rows.page_table), address(wanted), count], np.int64)
        own = see_all(model, rows)
        out = address(tokens), address(tops), address(seconds), ctypes.byref(done), steps
        given = address(settings), address(rows.context_lens), address(own), address(limits)
        places = *model.places, address(shape), address(inputs)
        failed = self._run(*out, *given, *places, model.turn, model.scale, model.eps)
        if failed == 2:
            raise IndexError("a token is none of the model's")
        if failed:
            raise MemoryError(f"no memory for {count} lines of {model.sizes[0]} numbers")
        return tokens[: done.value], tops[: done.value], seconds[: done.value]


@lru_cache(maxsize=1)
def steps_op() -> StepsOp | None:
    """The compiled op, or None where there is none."""
    ops = native_ops()
    return None if ops is None else StepsOp(ops.library)
