"""The packed inputs of one forward."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

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

    def wanted(self) -> PagedRows:
        """What attention must know of the tokens at `logits_at` alone, in their order. On a CPU: it waits for them."""
        rows, at = self.rows, self.logits_at.numpy()
        counts = np.bincount(np.searchsorted(rows.query_lens.cumsum(), at, "right"), minlength=len(rows.query_lens))
        kept = np.flatnonzero(counts)
        counts, tree = counts[kept], rows.tree
        if tree is not None:
            tree = TreeMask(tree.visible[at], tree.base[at], tree.positions[at])
        several = counts > 1 if tree is None else (counts > 1) | (tree.visible[counts.cumsum() - counts] != ALL)
        return replace(
            rows,
            num_decodes=int(several.argmax()) if several.any() else len(kept),
            query_lens=counts,
            context_lens=rows.context_lens[kept],
            page_table=rows.page_table[kept],
            slots=rows.slots[self.logits_at],
            tree=tree,
            _derived={},
        )


def build_plan(
    rows: Rows[PlanRow], page_size: int, device: torch.device | str = "cpu", backend: str = "auto"
) -> StepPlan:
    """Pack `rows`, of which those with `count` 1 come first, into one copy to `device`.

    Raises:
        ValueError: a row with one token stands behind a longer one (their order tells attention which are decodes).
    """
    decodes = sum([row.count == 1 and not row.branches for row in rows])
    if any([row.count != 1 or row.branches for row in rows[:decodes]]):
        raise ValueError("rows with one token must come first")
    # Lists: a step of few rows would spend longer in numpy's calls.
    token_ids, positions, slots, wanted = [], [], [], []
    for row in rows:
        pages, places = row.sequence.pages, range(row.first, row.first + row.count)
        token_ids += row.token_ids
        positions += row.span.positions if row.branches else places
        slots += [pages[place // page_size] * page_size + place % page_size for place in places]
        wanted += range(len(token_ids) - row.logits, len(token_ids))
    total = len(token_ids)
    packed = _parted(np.array(token_ids + positions + slots + wanted, np.int64), total, device)
    counts = np.array([row.count for row in rows], np.int64)
    ends = np.array([row.first + row.count for row in rows], np.int64)
    tree = _tree_mask(rows, positions) if any([row.branches for row in rows]) else None
    return StepPlan(
        token_ids=packed[0],
        positions=packed[1],
        logits_at=packed[3],
        rows=PagedRows(
            page_size,
            decodes,
            counts,
            ends,
            page_table([row.sequence for row in rows]),
            packed[2],
            backend,
            tree,
            vouched=True,
        ),
    )


def _parted(numbers: np.ndarray, total: int, device: torch.device | str) -> list[torch.Tensor]:
    """Three times `total` numbers and the rest, after one copy to `device`; on a CPU without torch's slower calls."""
    cuts = [slice(0, total), slice(total, 2 * total), slice(2 * total, 3 * total), slice(3 * total, None)]
    if (device if isinstance(device, str) else device.type) == "cpu":
        return [torch.from_numpy(numbers[cut]) for cut in cuts]
    packed = torch.from_numpy(numbers).to(device)
    return [packed[cut] for cut in cuts]


def _tree_mask(rows: Rows[PlanRow], positions: list[int]) -> TreeMask:
    """Who sees whom where drafts branch. positions: of all tokens."""
    visible, base = [], []
    for row in rows:
        visible += row.span.visible if row.branches else [ALL] * row.count
        base += [row.span.base if row.branches else row.first] * row.count
    return TreeMask(*(np.array(part, np.int64) for part in (visible, base, positions)))


def page_table(sequences: Rows[Sequence]) -> np.ndarray:
    """Page tables of all sequences, int64 `[sequences, longest]`, 0 behind a sequence's last page."""
    lengths = [len(sequence.pages) for sequence in sequences]
    if min(lengths) == max(lengths):
        return np.array([sequence.pages for sequence in sequences], np.int64)
    table = np.zeros((len(sequences), max(lengths)), np.int64)
    filled = np.arange(table.shape[1]) < np.array(lengths)[:, None]
    table[filled] = [page for sequence in sequences for page in sequence.pages]
    return table
