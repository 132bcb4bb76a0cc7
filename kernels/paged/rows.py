"""What attention must know of a step: which pages each row reads, which slots are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PagedRows:
    """Rows of one step. The first `num_decodes` rows have one query token each.

    Attributes:
        page_size: tokens a page.
        num_decodes: rows at the beginning whose query length is 1.
        query_lens: int64 `[rows]`, tokens that each row computes in this step.
        context_lens: int64 `[rows]`, tokens that each row's last query sees, itself included.
        page_table: int64 `[rows, max_pages]`, page of each `page_size` tokens; 0 behind a row's last.
        slots: int64 `[tokens]` on the model's device: `page * page_size + offset` of each token.
        backend: `torch` keeps to torch's own ops; `auto` takes compiled ones where there are any.
        grouped: whether what many queries see is computed once for all of them, where an op can (see `groups.py`).
    """

    page_size: int
    num_decodes: int
    query_lens: np.ndarray
    context_lens: np.ndarray
    page_table: np.ndarray
    slots: torch.Tensor
    backend: str = "auto"
    grouped: bool = True
    _derived: dict = field(default_factory=dict, repr=False)

    def derived(self, key: object, make: Callable[[], T]) -> T:
        """`make()`, computed once for this step: the layers share index tensors."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
