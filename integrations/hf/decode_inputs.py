"""What a captured decode step reads: static buffers, filled by one copy. Sizes come in few buckets. Knows no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from hf_paged.kernels.rows import PagedRows
from hf_paged.kernels.worklist import StepTensors, shared_pages
from hf_paged.plan import PlanRow, StepPlan

LEAST_SLOTS = 1024  # of a row, for which a step is captured
# Fields an entry a row; the page table comes behind them, `width` pages a row.
FIELDS = {
    "ids": np.int64,
    "positions": np.int64,
    "slots": np.int64,
    "seeds": np.int64,
    "top_k": np.int64,
    "context": np.int32,
    "temperature": np.float32,
    "limit": np.float32,
    "min_p": np.float32,
    "order": np.int32,
    "common": np.int32,
}
ALIGNMENT = 16


def batch_bucket(rows: int) -> int:
    """Rows for which a step is captured: 1, 2, 4, then multiples of 8 up to 64, of 32 up to 256, of 128."""
    if rows <= 8:
        return 1 << max(rows - 1, 0).bit_length()
    step = 8 if rows <= 64 else 32 if rows <= 256 else 128
    return -(-rows // step) * step


def width_bucket(slots: int, page_size: int) -> int:
    """Pages of a row for which a step is captured: those of a power of two of slots, at least `LEAST_SLOTS`."""
    return max(1, (1 << (max(slots, LEAST_SLOTS) - 1).bit_length()) // page_size)


@dataclass(frozen=True)
class Layout:
    """Where each field of a bucket lies in one buffer of bytes: `rows` rows of `width` pages.

    `shared`: rows may have pages in common, which are read once for several of them.
    """

    rows: int
    width: int
    shared: bool = False

    def parts(self) -> dict[str, tuple[int, int, type]]:
        """First byte, number of elements and dtype of every field."""
        parts, at = {}, 0
        for name, kind in (*FIELDS.items(), ("table", np.int32)):
            count = self.rows * (self.width if name == "table" else 1)
            parts[name] = at, count, kind
            at += -(-count * np.dtype(kind).itemsize // ALIGNMENT) * ALIGNMENT
        return parts

    @property
    def size(self) -> int:
        """Bytes of all."""
        at, count, kind = self.parts()["table"]
        return at + -(-count * np.dtype(kind).itemsize // ALIGNMENT) * ALIGNMENT

    def arrays(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Views into a uint8 array."""
        views = {
            name: buffer[at : at + count * np.dtype(kind).itemsize].view(kind)
            for name, (at, count, kind) in self.parts().items()
        }
        views["table"] = views["table"].reshape(self.rows, self.width)
        return views

    def tensors(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same into a uint8 tensor."""
        views = {}
        for name, (at, count, kind) in self.parts().items():
            dtype = torch.from_numpy(np.empty(0, kind)).dtype
            views[name] = buffer[at : at + count * dtype.itemsize].view(dtype)
        views["table"] = views["table"].view(self.rows, self.width)
        return views


def clear(arrays: dict[str, np.ndarray]) -> None:
    """No row: nothing is seen, nothing is stored."""
    for array in arrays.values():
        array.fill(0)
    arrays["slots"].fill(-1)
    arrays["limit"].fill(-1)


def fill(arrays: dict[str, np.ndarray], rows: Sequence[PlanRow], page_size: int) -> bool:
    """Write `rows`, which all decode, into the first lines; the others hold no row.

    Returns:
        whether they have pages in common, so many that it pays to read them once for several rows.
    """
    n = len(rows)
    for name in FIELDS:
        arrays[name][n:] = -1 if name in ("slots", "limit") else 0
    samplings = [planned.row.sampling for planned in rows]
    params = [sampling.params for sampling in samplings]
    arrays["ids"][:n] = [planned.sequence.tokens[-1] for planned in rows]
    computed = np.array([planned.sequence.computed for planned in rows], np.int64)
    arrays["positions"][:n] = computed
    arrays["context"][:n] = computed + 1
    arrays["seeds"][:n] = np.array([sampling.seed & _ALL for sampling in samplings], np.uint64).view(np.int64)
    arrays["top_k"][:n] = [max(p.top_k, 0) for p in params]
    arrays["temperature"][:n] = [0.0 if p.greedy else p.temperature for p in params]
    arrays["limit"][:n] = [1.0 - p.top_p if p.top_p < 1.0 else -1.0 for p in params]
    arrays["min_p"][:n] = [p.min_p for p in params]
    table = arrays["table"]
    table.fill(0)
    held = np.array([len(planned.sequence.pages) for planned in rows])
    pages = chain.from_iterable(planned.sequence.pages for planned in rows)
    table[:n][np.arange(table.shape[1]) < held[:, None]] = np.fromiter(pages, np.int32, held.sum())
    page = table[np.arange(n), computed // page_size].astype(np.int64)
    arrays["slots"][:n] = page * page_size + computed % page_size
    arrays["order"][:] = np.arange(len(table))
    shared = shared_pages(table[:n], computed + 1, page_size)
    if shared is not None:
        arrays["order"][:n], arrays["common"][:n] = shared
    return shared is not None


_ALL = (1 << 64) - 1


def static_plan(tensors: dict[str, torch.Tensor], page_size: int, backend: str, shared: bool) -> StepPlan:
    """The plan of a step whose numbers are those that lie in `tensors` when it runs. `shared`: see `Layout`.

    What the kernels need of a step is there already: nothing is read from the arrays of the host.
    """
    rows, width = tensors["table"].shape
    device, longest = tensors["table"].device, width * page_size
    arrays = np.ones(rows, np.int64), np.full(rows, longest), np.zeros((rows, 1), np.int64)
    paged = PagedRows(page_size, rows, *arrays, tensors["slots"], backend, grouped=False, vouched=True)
    names = ("table", "context", "order", "common")[: 4 if shared else 2]
    paged.derived(("step", device), lambda: StepTensors(*(tensors[name] for name in names)))
    paged.derived("longest", lambda: longest)
    wanted = torch.arange(rows, device=device)
    return StepPlan(tensors["ids"], tensors["positions"], wanted, paged)
