"""Whether copies of weights are still good."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Watched:
    """Copies of linear layers' weights, good for as long as the weights are.

    `current` sees parameters that were replaced or changed in place, but not through `.data`; these change `unchanged`,
    which reads all of them: about 1 ms for 57 MB.
    """

    def watch(self, layers: Sequence[nn.Linear]) -> None:
        """Take the weights and biases as they are now for what was copied."""
        self._slots = [(layer._parameters, name) for layer in layers for name in ("weight", "bias")]
        self._made, self._sums = self._state(), self._sum()

    def current(self) -> bool:
        """Whether the weights are still those that were copied."""
        return self._state() == self._made

    def unchanged(self) -> bool:
        """Whether not even a write through `.data` has changed them (an exchange of whole weights apart)."""
        return self.current() and self._sum() == self._sums

    def _sum(self) -> list[int]:
        """A sum of the bits of every weight, modulo 2**64."""
        sums = [_bits(p).sum() for slot, name in self._slots if (p := slot[name]) is not None]
        return torch.stack(sums).tolist()

    def _state(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for slot, name in self._slots if (p := slot[name]) is not None]


def _bits(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    return flat.view(torch.int32 if flat.numel() % 2 else torch.int64)
