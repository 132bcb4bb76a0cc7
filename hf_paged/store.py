"""The K and V tensors of one model, in pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.kernels.fp8 import all_finite, raw, selected
from hf_paged.kernels.room import fresh_zeros
from hf_paged.memory import PageCopy


@dataclass(frozen=True)
class LayerShape:
    """KV of one layer and token: `kv_heads` heads, keys of `key_dim` and values of `value_dim` elements."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on a CPU, cost memory only where they are written."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return fresh_zeros(int(np.prod(shape)) * dtype.itemsize).view(dtype).view(shape)


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numbers of so many bytes, as numpy takes them


class KVStore:
    """Keys and values of one model, a tensor a layer: `[num_pages + 1, kv_heads, page_size, head_dim]`.

    Heads lie outside slots, so that a page's keys of one head are one matrix: attention reads pages in place. Page 0
    takes the writes that must go nowhere. Every slot holds finite numbers at all times (zeros at first; `scrub` after a
    model went wrong), since attention multiplies masked slots by zero.

    Args:
        layers: shape of every layer.
        num_pages: pages beside page 0.
        page_size: tokens a page.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.num_pages, self.page_size, self.dtype = list(layers), num_pages, page_size, dtype
        device = torch.device(device)
        self.keys = [self._make(s.kv_heads, s.key_dim, device) for s in layers]
        self.values = [self._make(s.kv_heads, s.value_dim, device) for s in layers]
        self._as_arrays: list[np.ndarray] | None = None

    def _make(self, heads: int, dim: int, device: torch.device) -> torch.Tensor:
        return lazy_zeros((self.num_pages + 1, heads, self.page_size, dim), self.dtype, device)

    @staticmethod
    def page_bytes(layers: list[LayerShape], page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return sum(s.elements for s in layers) * page_size * dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        return self.page_bytes(self.layers, self.page_size, self.dtype)

    def copy(self, copies: list[PageCopy]) -> None:
        """Carry out page copies in all layers; zeros go behind what is valid: it may not be finite."""
        if not copies:
            return
        sources, targets, valid = map(list, zip(*((c.source, c.target, c.valid) for c in copies), strict=True))
        if self.keys[0].device.type == "cpu":
            for numbers in self._arrays():
                numbers[targets] = numbers[sources]
                for target, length in zip(targets, valid, strict=True):
                    numbers[target, :, length:] = 0
            return
        source, target, length = torch.tensor([sources, targets, valid]).to(self.keys[0].device)
        behind = (torch.arange(self.page_size, device=source.device) >= length[:, None])[:, None, :, None]
        for tensor in map(raw, (*self.keys, *self.values)):
            tensor.index_copy_(0, target, tensor.index_select(0, source).masked_fill_(behind, 0))

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy slots (`page * page_size + offset`, int64 `[n]`) in all layers; all are read before any is written."""
        device, size = self.keys[0].device, self.page_size
        if device.type == "cpu":  # a few slots, one by one: arrays as indices would take several times as long
            at, to = ([divmod(slot, size) for slot in slots.tolist()] for slots in (sources, targets))
            for numbers in self._arrays():
                taken = [numbers[page, :, offset].copy() for page, offset in at]
                for part, (page, offset) in zip(taken, to, strict=True):
                    numbers[page, :, offset] = part
            return
        at, to = (sources // size, sources % size), (targets // size, targets % size)
        at, to = ([torch.from_numpy(part).to(device) for part in pair] for pair in (at, to))
        for tensor in map(raw, (*self.keys, *self.values)):
            tensor[to[0], :, to[1]] = tensor[at[0], :, at[1]]

    def _arrays(self) -> list[np.ndarray]:
        """All tensors of a store on a CPU, as numpy has them: it takes a tenth of torch's time to index a few slots."""
        if self._as_arrays is None:
            tensors = (*self.keys, *self.values)
            self._as_arrays = [tensor.view(BITS[tensor.element_size()]).numpy() for tensor in tensors]
        return self._as_arrays

    def release(self) -> None:
        """Give the memory back: there are no pages any more."""
        self.keys, self.values, self._as_arrays = [], [], None

    def clear(self, slots: np.ndarray) -> None:
        """Write zeros to slots (`page * page_size + offset`, int64 `[n]`)."""
        page, offset = (torch.from_numpy(part).to(self.keys[0].device) for part in divmod(slots, self.page_size))
        for tensor in map(raw, (*self.keys, *self.values)):
            tensor[page, :, offset] = 0

    def finite(self, pages: list[int]) -> bool:
        """Whether all numbers of `pages` are finite."""
        if not pages:
            return True
        index = torch.tensor(pages, device=self.keys[0].device)
        return all(all_finite(selected(tensor, index)) for tensor in (*self.keys, *self.values))

    def scrub(self, pages: list[int]) -> None:
        """Write zeros to `pages`: after a request whose model gave numbers that are not finite."""
        if pages:
            index = torch.tensor(pages, device=self.keys[0].device)
            for tensor in map(raw, (*self.keys, *self.values)):
                tensor.index_fill_(0, index, 0)
