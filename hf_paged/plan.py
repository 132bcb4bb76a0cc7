"""The packed inputs of one forward."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.kernels.rows import PagedRows
from hf_paged.sequence import Sequence


@dataclass(frozen=True, eq=False)
class PlanRow:
    """One row of a step: compute the next `count` tokens of `sequence`, and logits behind the last `logits` of them.

    `row` is whatever the caller wants to find again.
    """

    row: object
    sequence: Sequence
    count: int
    logits: int


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
    starts = np.array([row.sequence.computed for row in rows], np.int64)
    decodes = int((counts == 1).sum())
    if (counts[:decodes] != 1).any():
        raise ValueError("rows with one token must come first")
    page_table = _page_table(rows)
    token_ids = [
        token
        for row in rows
        for token in row.sequence.tokens[row.sequence.computed : row.sequence.computed + row.count]
    ]
    owner = np.repeat(np.arange(len(rows)), counts)
    ends = np.cumsum(counts)
    positions = np.arange(len(owner)) - (ends - counts)[owner] + starts[owner]
    slots = page_table[owner, positions // page_size] * page_size + positions % page_size
    wanted = [np.arange(end - row.logits, end) for row, end in zip(rows, ends, strict=True) if row.logits]
    logits_at = np.concatenate(wanted) if wanted else np.zeros(0, np.int64)
    total = len(owner)
    packed = np.concatenate([np.array(token_ids, np.int64), positions, slots, logits_at])
    packed = torch.from_numpy(packed).to(device)
    return StepPlan(
        token_ids=packed[:total],
        positions=packed[total : 2 * total],
        logits_at=packed[3 * total :],
        rows=PagedRows(page_size, decodes, counts, starts + counts, page_table, packed[2 * total : 3 * total], backend),
    )


def _page_table(rows: Rows[PlanRow]) -> np.ndarray:
    """Page tables of all rows, int64 `[rows, longest]`, 0 behind a row's last page."""
    lengths = [len(row.sequence.pages) for row in rows]
    table = np.zeros((len(rows), max(lengths)), np.int64)
    filled = np.arange(table.shape[1]) < np.array(lengths)[:, None]
    table[filled] = [page for row in rows for page in row.sequence.pages]
    return table
