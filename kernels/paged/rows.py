"""What attention must know of a step: which pages each row reads, which slots are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


ALL = -1  # in `TreeMask.visible`: every slot up to the query's own


@dataclass(frozen=True, eq=False)
class TreeMask:
    """Which slots queries see where draft tokens branch: those before `base`, and of the next 63 what `visible` says.

    Slots of a row then hold a tree in any order that has parents first, so a slot is no position.

    Attributes:
        visible: int64 `[tokens]`, bit `j`: the query sees slot `base + j` of its row. `ALL`: it sees all up to its own.
        base: int64 `[tokens]`, slots from the first that all of a tree's queries see.
        positions: int64 `[tokens]`, places of the queries in their texts.
    """

    visible: np.ndarray
    base: np.ndarray
    positions: np.ndarray


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
        tree: which slots queries see, where draft tokens branch.
        grouped: whether what many queries see is read and computed once for all of them, where an op can (see
            `groups.py`, `splits.py`).
        vouched: whether who made it says that it is right, so that the ops need not look (see `check.py`).
    """

    page_size: int
    num_decodes: int
    query_lens: np.ndarray
    context_lens: np.ndarray
    page_table: np.ndarray
    slots: torch.Tensor
    backend: str = "auto"
    tree: TreeMask | None = None
    grouped: bool = True
    vouched: bool = False
    _derived: dict = field(default_factory=dict, repr=False)

    def derived(self, key: object, make: Callable[[], T]) -> T:
        """`make()`, computed once for this step: the layers share index tensors."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]
