"""Whether numbers on a CPU are what they were: `csrc/sums.c`, or torch and numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from hf_paged.kernels.native import address, native_ops

LINE = 16  # numbers that are taken or left together


def sum_of_bits(tensors: Sequence[torch.Tensor], every: int = 1, turn: int = 0) -> int:
    """Of every so many lines of 16 numbers that of number `turn`, modulo 2**64: a change of any of them is seen."""
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    ops = native_ops()
    if ops is None:
        return sum((2 * at + 1) * _sum(tensor.view(-1), every, turn) for at, tensor in enumerate(tensors)) % 2**64
    at, sizes = (np.array(list(map(of, tensors)), np.int64) for of in (torch.Tensor.data_ptr, torch.Tensor.numel))
    run = ops.library.sum_of_bits
    run.restype, run.argtypes = ctypes.c_uint64, [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
    return run(address(at), address(sizes), len(tensors), every, turn)


def _sum(numbers: torch.Tensor, every: int, turn: int) -> int:
    whole = len(numbers) // LINE * LINE
    lines = numbers[:whole].clone().view(torch.int64).view(-1, LINE // 2)[turn::every]
    rest = 0 if turn else sum(int(bits) & 0xFFFFFFFF for bits in numbers[whole:].view(torch.int32).tolist())
    return int(lines.sum()) + rest


class Samples:
    """Some numbers of each of `views`, one-dimensional, to be compared with what they are now.

    Args:
        hold: False: go by addresses alone where that is possible.

    Attributes:
        held: what keeps the numbers where they are; empty if `same` goes by addresses alone: who asks sees to it then
            that nothing there was freed.
    """

    def __init__(self, views: Sequence[torch.Tensor], count: int, hold: bool = True) -> None:
        self.held = [view[:: max(len(view) // count, 1)] for view in views]
        ops = native_ops()
        self._run = None if ops is None else ops.library.same_numbers
        if self._run is None:
            self._kept = self._read()
            return
        firsts, steps, sizes, counts = (
            np.array([of(view) for view in self.held], np.int64)
            for of in (torch.Tensor.data_ptr, lambda view: view.stride(0), torch.Tensor.element_size, len)
        )
        index = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        self._at = np.repeat(firsts, counts) + np.repeat(steps * sizes, counts) * index
        self._sizes, self._kept = np.repeat(sizes, counts), np.zeros(len(index), np.uint64)
        self.held = self.held if hold else []
        self._run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
        self._places = address(self._at), address(self._sizes), address(self._kept), len(index)
        self._run(*self._places, 1)

    def same(self) -> bool:
        """Whether they are."""
        return bool(self._run(*self._places, 0)) if self._run is not None else self._read() == self._kept

    def _read(self) -> bytes:
        return b"".join(view.view(torch.uint8).numpy().tobytes() for view in map(torch.Tensor.contiguous, self.held))
