"""Compiled draws on a CPU: what `csrc/sampling.c` does, for tensors. Optional."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch

from hf_paged.kernels.native import address, matrix_lines, native_ops

_I, _P = ctypes.c_int64, ctypes.c_void_p


class SamplingOps:
    """Draws from scores float32 `[rows, vocab]` on the CPU, each row by itself.

    The parameters of both ops, tensors or arrays with an entry a row: `temperature`, `limit` (1 - top_p, or -1) and
    `min_p` float32, `top_k` (0: off), `seeds` and `positions` int64.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._draw, self._likely = library.draw_tokens, library.likely_tokens
        self._draw.argtypes = [_P, _P, _P, _I, _I, _I] + [_P] * 6
        self._likely.argtypes = [_P, _P, _I, _P, _I, _I, _I] + [_P] * 6

    def draw(self, scores: torch.Tensor, *parameters: torch.Tensor | np.ndarray) -> tuple[list[int], list[float]]:
        """A token for each row, and the largest of its scores over the temperature: where that is not finite, -1."""
        scores, (rows, vocab) = matrix_lines(scores), scores.shape
        tokens, tops = np.empty(rows, np.int64), np.empty(rows, np.float32)
        failed = self._draw(address(tokens), address(tops), *_matrix(scores), *map(_address, parameters))
        if failed:
            raise MemoryError(f"no memory to draw from {vocab} tokens")
        return tokens.tolist(), tops.tolist()

    def likely(
        self, scores: torch.Tensor, width: int, *parameters: torch.Tensor | np.ndarray
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The `width` tokens of each row that are likeliest to be drawn, and estimates of their odds, best first.

        A row of a temperature under 1e-5 is greedy. Fewer than `width`: no others are allowed. NaN where scores are.
        """
        scores, (rows, vocab) = matrix_lines(scores), scores.shape
        ids, probs = np.empty((rows, width), np.int64), np.empty((rows, width), np.float32)
        failed = self._likely(ids.ctypes.data, probs.ctypes.data, width, *_matrix(scores), *map(_address, parameters))
        if failed:
            raise MemoryError(f"no memory to choose from {vocab} tokens")
        return present(ids, probs)


def present(ids: np.ndarray, probs: np.ndarray) -> tuple[list[list[int]], list[list[float]]]:
    """Both `[rows, width]` as lists, without the missing ones, which stand last in a row and have the id -1."""
    tokens, odds = ids.tolist(), probs.tolist()
    if any([row[-1] < 0 for row in tokens]):
        counts = [sum(token >= 0 for token in row) for row in tokens]
        return tuple([row[:n] for row, n in zip(part, counts, strict=True)] for part in (tokens, odds))
    return tokens, odds


def _matrix(scores: torch.Tensor) -> tuple[int, int, int, int]:
    return scores.data_ptr(), scores.stride(0), *scores.shape


def _address(parameter: torch.Tensor | np.ndarray) -> int:
    return address(parameter) if isinstance(parameter, np.ndarray) else parameter.data_ptr()


@lru_cache(maxsize=1)
def sampling_ops() -> SamplingOps | None:
    """The compiled ops, or None where there are none."""
    ops = native_ops()
    return None if ops is None else SamplingOps(ops.library)
