"""Drafts of a model's forwards over a few lines by a compiled op, without plans or logits: see `native_drafts.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_paged.filters import draw_arrays
from hf_paged.kernels.native_blocks import FREQUENCIES
from hf_paged.kernels.native_drafts import Chosen, Line, NativeDrafts
from hf_paged.kernels.rows import ALL
from hf_paged.penalties import is_touched
from hf_paged.plan import StepPlan, page_table
from hf_paged.speculation.proposal import MOST_NODES, tree_places

if TYPE_CHECKING:
    from hf_paged.speculation.tree import Tree


class FewDrafts:
    """The drafts of one step, for `trees` whose rows draw from what their draft model says as it is.

    Args:
        op: of the draft model. page_size: of its pages.
        most: tokens of one forward.
    """

    def __init__(self, op: NativeDrafts, trees: Sequence[Tree], page_size: int, most: int) -> None:
        rows = [tree.planned.row.sampling for tree in trees]
        self.op, self.most, self._size = op, min(most, op.model.most), page_size
        op.begin(draw_arrays([(row.params, row.seed, row.position) for row in rows]))
        self._trees, self._number = trees, {tree: number for number, tree in enumerate(trees)}

    @classmethod
    def begin(
        cls,
        forward: Callable[[StepPlan], torch.Tensor],
        trees: Sequence[Tree],
        page_size: int,
        most: int,
        op: NativeDrafts | None = None,
    ) -> FewDrafts | None:
        """Drafts of `forward`, or None where it has no such op, or a row wants something done to logits.

        Args:
            op: of an earlier step.
        """
        few_model = getattr(forward, "few_model", None)
        rows = [tree.planned.row.sampling for tree in trees]
        if few_model is None:
            return None
        if any((row.pipeline is not None and row.pipeline.drafting) or is_touched(row) for row in rows):
            return None
        model = few_model()
        if model is None or not model.ends[FREQUENCIES] or len(trees) > model.most:
            return None
        longest = max(tree.planned.sequence.computed for tree in trees) + 1 + MOST_NODES
        if any(window is not None and window < longest for window in model.windows):
            return None
        if op is None or op.model is not model:
            op = NativeDrafts(model, page_size)
        return cls(op, trees, page_size, most)

    def behind_known(self, known: Sequence[int], width: int) -> Chosen:
        """What comes behind the last token of every row, of which so many tokens are known; the others are computed."""
        lines, wanted = [], []
        for number, begin in enumerate(known):
            lines += self._unknown(number, begin)
            wanted.append(len(lines) - 1)
        return self._chosen(lines, wanted, 0, width)

    def chain(self, known: int, deepest: int, width: int, odds: np.ndarray, least: float) -> Chosen:
        """What comes behind the last token of the only row, behind the likeliest of that, and so on: see
        `NativeDrafts.chain`. Slots of all but the deepest are there."""
        sequence = self._trees[0].planned.sequence
        start = sequence.computed + 1
        slots = [sequence.slot(place, self._size) for place in range(start, start + deepest - 1)]
        return self.op.chain(self._unknown(0, known), page_table([sequence]), slots, width, odds, least)

    def behind_frontier(self, trees: Sequence[Tree], depth: int, width: int) -> Chosen:
        """What comes behind the frontiers of `trees`, at `depth`."""
        lines: list[Line] = []
        for tree in trees:
            start, number = tree.planned.sequence.computed + 1, self._number[tree]
            places, visible = range(start, start + len(tree.tokens)), [ALL] * len(tree.tokens)
            if tree.branches:
                places, visible = (part[1:] for part in tree_places(tree.parents, start - 1))
            for node in tree.frontier:
                lines.append(self._line(number, tree.tokens[node], places[node], start + node, visible[node]))
            tree.fed.update(tree.frontier)
        return self._chosen(lines, range(len(lines)), depth - 1, width)

    def _unknown(self, number: int, begin: int) -> list[Line]:
        """A row's tokens from place `begin` on, its last one included."""
        sequence = self._trees[number].planned.sequence
        places = range(begin, sequence.computed + 1)
        return [self._line(number, sequence.tokens[place], place, place, ALL) for place in places]

    def _line(self, number: int, token: int, position: int, place: int, visible: int) -> Line:
        sequence = self._trees[number].planned.sequence
        return token, position, sequence.slot(place, self._size), number, place + 1, visible, sequence.computed

    def _chosen(self, lines: Sequence[Line], wanted: Sequence[int], ahead: int, width: int) -> Chosen:
        table = page_table([tree.planned.sequence for tree in self._trees])
        return self.op(lines, wanted, table, ahead, width)
