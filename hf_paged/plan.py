"""The packed inputs of one forward."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.kernels.rows import ALL, PagedRows, TreeMask
from hf_paged.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that a row computes beside, or instead of, those of its sequence: drafts.

    Attributes:
        token_ids: what is computed, in slots `first`, `first + 1`, ... of the sequence.
        first: at most 63 behind `base`.
        positions: place of each token in its text; None: one after another from `first` on.
        base, visible: as in `TreeMask`; visible is None where the tokens do not branch.
    """

    token_ids: tuple[int, ...]
    first: int
    base: int
    positions: tuple[int, ...] | None = None
    visible: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class PlanRow:
    """One row of a step: compute the next `count` tokens of `sequence`, and logits behind the last `logits` of them.

    `row` is whatever the caller wants to find again. With a `span` its tokens are computed.
    """

    row: object
    sequence: Sequence
    count: int
    logits: int
    span: Span | None = None

    @property
    def first(self) -> int:
        """The first slot that is written."""
        return self.sequence.computed if self.span is None else self.span.first

    @property
    def branches(self) -> bool:
        """Whether its tokens are a tree's: not each sees all slots before its own."""
        return self.span is not None and self.span.visible is not None

    @property
    def token_ids(self) -> Rows[int]:
        if self.span is not None:
            return self.span.token_ids
        start = self.sequence.computed
        return self.sequence.tokens[start : start + self.count]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Inputs of one forward over `tokens` packed tokens. Rows with one token come first.

    Attributes:
        token_ids: int64 `[tokens]`.
        positions: int64 `[tokens]`, place of each token in its own sequence.
        logits_at: int64 `[n]`, packed tokens behind which logits are wanted.
        rows: pages, slots and lengths, for attention.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    logits_at: torch.Tensor
    rows: PagedRows

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]


def build_plan(
    rows: Rows[PlanRow], page_size: int, device: torch.device | str = "cpu", backend: str = "auto"
) -> StepPlan:
    """Pack `rows`, of which those with `count` 1 come first, into one copy to `device`.

    Raises:
        ValueError: a row with one token stands behind a longer one (their order tells attention which are decodes).
    """
    counts = np.array([row.count for row in rows], np.int64)
    starts = np.array([row.first for row in rows], np.int64)
    single = [row.count == 1 and not row.branches for row in rows]
    decodes = sum(single)
    if not all(single[:decodes]):
        raise ValueError("rows with one token must come first")
    page_table = _page_table(rows)
    token_ids = np.array([token for row in rows for token in row.token_ids], np.int64)
    owner = np.repeat(np.arange(len(rows)), counts)
    ends = np.cumsum(counts)
    places = np.arange(len(owner)) - (ends - counts)[owner] + starts[owner]
    slots = page_table[owner, places // page_size] * page_size + places % page_size
    wanted = [np.arange(end - row.logits, end) for row, end in zip(rows, ends, strict=True) if row.logits]
    logits_at = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
    total, tree = len(owner), _tree_mask(rows, places, ends, starts[owner])
    positions = places if tree is None else tree.positions
    packed = torch.from_numpy(np.concatenate([token_ids, positions, slots, logits_at])).to(device)
    return StepPlan(
        token_ids=packed[:total],
        positions=packed[total : 2 * total],
        logits_at=packed[3 * total :],
        rows=PagedRows(
            page_size, decodes, counts, starts + counts, page_table, packed[2 * total : 3 * total], backend, tree
        ),
    )


def _tree_mask(rows: Rows[PlanRow], places: np.ndarray, ends: np.ndarray, firsts: np.ndarray) -> TreeMask | None:
    """Who sees whom in the rows whose drafts branch; None where none do.

    Args:
        places: slot of each token. firsts: the first slot that its row writes. ends: tokens up to each row's last.
    """
    if not any(row.branches for row in rows):
        return None
    mask = TreeMask(np.full(len(places), ALL), firsts.copy(), places.copy())
    for row, end in zip(rows, ends.tolist(), strict=True):
        if row.branches:
            own = slice(end - row.count, end)
            mask.visible[own], mask.base[own], mask.positions[own] = row.span.visible, row.span.base, row.span.positions
    return mask


def _page_table(rows: Rows[PlanRow]) -> np.ndarray:
    """Page tables of all rows, int64 `[rows, longest]`, 0 behind a row's last page."""
    lengths = [len(row.sequence.pages) for row in rows]
    table = np.zeros((len(rows), max(lengths)), np.int64)
    filled = np.arange(table.shape[1]) < np.array(lengths)[:, None]
    table[filled] = [page for row in rows for page in row.sequence.pages]
    return table
