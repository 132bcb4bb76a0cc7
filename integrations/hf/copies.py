"""Whether copies of weights are still good."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_paged.kernels.native_sums import sum_of_bits

LOOK_BYTES = 64 * 2**20  # of weights that are read at a time: some 1 to 2 ms


class Watched:
    """Copies of linear layers' float32 weights, good for as long as the weights are.

    `current` sees parameters that were replaced or changed in place, but not through `.data`; these change `unchanged`,
    which reads them: all of 64 MB, of a larger model's another share each time.

    Attributes:
        layers: that were copied.
    """

    def place(self, layers: Sequence[nn.Linear]) -> None:
        """Note which weights and biases there are, but not their numbers: only `current` can be asked."""
        self.layers = list(layers)
        self._slots = [(layer._parameters, name) for layer in layers for name in ("weight", "bias")]
        self._made, self._looks = self._state(), 0

    def watch(self, layers: Sequence[nn.Linear]) -> None:
        """Take the weights and biases as they are now for what was copied."""
        self.place(layers)
        parts = self._parts()
        self._every = -(-sum(part.nbytes for part in parts) // LOOK_BYTES)
        self._sums = [sum_of_bits(parts, self._every, turn) for turn in range(self._every)]

    def current(self) -> bool:
        """Whether the weights are still those that were copied."""
        return self._state() == self._made

    def unchanged(self) -> bool:
        """Whether not even a write through `.data` has changed them (an exchange of numbers within one apart)."""
        if not self.current():
            return False
        turn = self._looks % self._every
        self._looks += 1
        return sum_of_bits(self._parts(), self._every, turn) == self._sums[turn]

    def _parts(self) -> list[torch.Tensor]:
        return [p for slot, name in self._slots if (p := slot[name]) is not None]

    def _state(self) -> list[tuple[int, int]]:
        return [(id(p), 0 if p.is_inference() else p._version) for p in self._parts()]
