"""KV slots of drafts: made writable before a step; behind it kept for accepted drafts, given up for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_paged.memory import Memory, OutOfPages
from hf_paged.plan import PlanRow
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.proposal import Proposal
from hf_paged.speculation.verify import Drawing
from hf_paged.store import KVStore


def with_drafts(planned: PlanRow, proposal: Proposal | None) -> PlanRow:
    """The same row with drafts behind its last token."""
    if proposal is None:
        return planned
    sequence, count = planned.sequence, 1 + len(proposal)
    span = proposal.span(sequence.tokens[-1], sequence.computed)
    return PlanRow(planned.row, sequence, count, count, span)


class DraftSlots:
    """Slots of drafts in an engine's memory.

    Args:
        store: the engine's KV. drafters: those that there are at a time, whose own KV follows.
    """

    def __init__(self, memory: Memory, store: KVStore, drafters: Sequence[Drafter]) -> None:
        self.memory, self.store, self.drafters = memory, store, drafters

    def reserve(self, planned: PlanRow, drafts: int) -> bool:
        """Make slots for drafts of a row writable. Drafts never take the pages of another row."""
        try:
            copies = self.memory.reserve(planned.sequence, 1 + drafts)
        except OutOfPages:
            return False
        self.store.copy(copies)
        for drafter in self.drafters:
            drafter.copied(copies)
        return True

    def settle(
        self, work: Sequence[PlanRow], drawings: Sequence[Drawing], logits: torch.Tensor, sound: bool
    ) -> list[tuple[PlanRow, Drawing, int]]:
        """KV of accepted drafts goes to its place and is committed; pages of the others are released.

        Args:
            sound: whether all logits are finite.

        Returns:
            rows that had drafts and did not fail, and how many of their tokens were computed before.
        """
        planned_of = {planned.row: planned for planned in work}
        alive = [
            (planned_of[drawing.row], drawing)
            for drawing in drawings
            if drawing.proposal is not None and drawing.row.sequence is not None  # else its request failed
        ]
        self._clean(alive, logits, sound)
        before = [planned.sequence.computed for planned, _ in alive]
        for planned, drawing in alive:
            sequence = planned.sequence
            # The last token's KV is never stored: a draft that ended the row is not committed.
            self.memory.commit(sequence, min(len(drawing.path), sequence.pending - 1))
            self.memory.rollback(sequence, sequence.computed)
        return [(*pair, computed) for pair, computed in zip(alive, before, strict=True)]

    def _clean(self, judged: list[tuple[PlanRow, Drawing]], logits: torch.Tensor, sound: bool) -> None:
        """Move KV of taken branches into place; put zeros where drafts left numbers that are not finite."""
        sources, targets, bad, at, size = [], [], [], 0, self.memory.page_size
        lines = [line for _, d in judged for line in range(d.line, d.line + 1 + len(d.proposal))]
        finite = [True] * len(lines) if sound else logits[lines].amax(1).isfinite().tolist()
        for planned, drawing in judged:
            sequence, first = planned.sequence, planned.span.first + 1
            for node in range(len(drawing.proposal)):
                if not finite[at + 1 + node]:
                    bad.append(sequence.slot(first + node, size))
            at += 1 + len(drawing.proposal)
            for place, node in enumerate(drawing.path):
                if place != node:
                    sources.append(sequence.slot(first + node, size))
                    targets.append(sequence.slot(first + place, size))
        if bad:
            self.store.clear(np.array(bad))
        if sources:
            self.store.move(np.array(sources), np.array(targets))
