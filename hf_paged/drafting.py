"""The loop's side of speculation: drafts into the plan, accepted ones into memory, rejected ones out of it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import numpy as np
import torch

from hf_paged.memory import Memory, OutOfPages, PageCopy
from hf_paged.plan import PlanRow
from hf_paged.request import Row
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.guide import Overhead
from hf_paged.speculation.proposal import Proposal
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.stats import SpeculationStats, collect
from hf_paged.speculation.suffix import SuffixIndex
from hf_paged.speculation.verify import Drawing
from hf_paged.stats import Recorder
from hf_paged.store import KVStore

REST = 3  # steps without any speculation behind one in which there was nothing to do


class Drafting:
    """Speculation in one engine.

    Args:
        memory, store: the engine's.
        measured: seconds that were measured here → those to go by: several processes must decide the same.

    Attributes:
        cost, overhead: what steps of the target take.
        speculators: by settings and draft model.
        drafters: all draft models.
    """

    def __init__(self, memory: Memory, store: KVStore, measured: Callable[[float], float] | None = None) -> None:
        self.memory, self.store = memory, store
        self.cost, self.overhead, self.measured = CostTable(), Overhead(), measured or float
        self.suffixes: SuffixIndex | None = None
        self.speculators: dict[tuple[SpeculationConfig, Drafter | None], Speculator] = {}
        self.drafters: list[Drafter] = []
        self.verified, self.verify_seconds = 0, 0.0  # forwards with drafts
        self._plain = False  # whether the latest step held no prompt
        self._before = 0  # drafts of the step before
        self._nodes, self._forward, self._drafted = 0, 0.0, 0.0
        self._rest, self._resting, self._rows = 0, False, 0  # steps left of a rest; whether this is one; its rows
        self._rested: list[float] = []  # seconds of the latest rest's steps

    def speculator(self, config: SpeculationConfig, drafter: Drafter | None = None) -> Speculator | None:
        """The speculator of these settings; None where nothing is to be drafted."""
        if config.off:
            return None
        known = self.speculators.get((config, drafter))
        if known is None:
            if config.method in ("suffix", "auto") and self.suffixes is None:
                self.suffixes = SuffixIndex(config.suffix_tokens)
            known = Speculator(config, self.cost, self.overhead, self.suffixes, drafter)
            self.speculators[config, drafter] = known
            if drafter is not None and drafter not in self.drafters:
                self.drafters.append(drafter)
                drafter.measured = self.measured
                self.memory.pool.taken = self._taken
        return known

    def drop(self, drafter: Drafter) -> None:
        """Nothing is drafted by `drafter` any more; its KV is freed."""
        if drafter in self.drafters:
            self.drafters.remove(drafter)
        self.speculators = {key: known for key, known in self.speculators.items() if key[1] is not drafter}

    def _taken(self, pages: list[int]) -> None:
        for drafter in self.drafters:
            drafter.taken(pages)

    def copied(self, copies: list[PageCopy]) -> None:
        """Pages were copied."""
        if copies and self.speculators:
            for drafter in self.drafters:
                drafter.copied(copies)

    def forget(self) -> None:
        """The model is not what it was."""
        for drafter in self.drafters:
            drafter.forget()

    def tidy(self) -> None:
        """Rows may have ended or wait: nothing is kept of them."""
        for drafter in self.drafters:
            drafter.tidy(self.memory.sequences)

    def check(self) -> None:
        """Verify the laws of drafters' own memory.

        Raises:
            AssertionError: one does not hold.
        """
        for drafter in self.drafters:
            drafter.check(self.memory.sequences)

    # -- before the forward

    def propose(
        self, work: list[PlanRow], most: int, waits: bool, soon: int
    ) -> tuple[list[PlanRow], dict[PlanRow, Proposal]]:
        """`work` with drafts behind the last tokens of rows, up to `most` tokens in all, and these drafts.

        Args:
            waits: whether rows wait for the places of these. soon: rows that decode once prompts have been read.
        """
        self._nodes = 0
        if not self.speculators or self._rests(len(work)):
            return work, {}
        self._drafted = sum(drafter.seconds for drafter in self.drafters)
        groups: dict[Speculator, list[PlanRow]] = {}
        for planned in work:
            row = planned.row
            if row.request.speculator is not None and row.output_ids and planned.sequence.pending == 1:
                groups.setdefault(row.request.speculator, []).append(planned)
        tokens = sum(planned.count for planned in work)
        drawn = sum(planned.count == planned.sequence.pending for planned in work)
        found: dict[PlanRow, Proposal] = {}
        for speculator, rows in groups.items():
            speculator.rested(len(self._rested))
            made = speculator.propose(rows, tokens, drawn, most - tokens, waits, soon, self._reserve)
            tokens += sum(map(len, made.values()))
            found |= made
        if groups and not any(speculator.busy for speculator in groups):
            self._rest = REST
        self._nodes = sum(map(len, found.values()))
        if not found:
            return work, found
        wider = [self._with_drafts(planned, found.get(planned)) for planned in work]
        drafts = {new: found[old] for old, new in zip(work, wider, strict=True) if old in found}
        # Decodes first, then drafts, then prompts.
        wider.sort(key=lambda planned: 0 if planned.count == 1 else 1 if planned in drafts else 2)
        return wider, drafts

    def _rests(self, rows: int) -> bool:
        """Whether the step goes without: what there was to do would cost more than comes of it."""
        self._resting = self._rest > 0 and rows == self._rows
        self._rest, self._rows = self._rest - 1 if self._resting else 0, rows
        return self._resting

    @staticmethod
    def _with_drafts(planned: PlanRow, proposal: Proposal | None) -> PlanRow:
        if proposal is None:
            return planned
        sequence, count = planned.sequence, 1 + len(proposal)
        span = proposal.span(sequence.tokens[-1], sequence.computed)
        return PlanRow(planned.row, sequence, count, count, span)

    def _reserve(self, planned: PlanRow, drafts: int) -> bool:
        """Make slots for drafts of a row writable. Drafts never take the pages of another row."""
        try:
            copies = self.memory.reserve(planned.sequence, 1 + drafts)
        except OutOfPages:
            return False
        self.store.copy(copies)
        self.copied(copies)
        return True

    # -- behind it

    def forwarded(self, work: Rows[PlanRow], tokens: int, seconds: float) -> None:
        """Note what the forward took."""
        if not self.speculators or self._resting:
            return
        seconds = self.measured(seconds)
        behind, self._before = self._plain and self._before, self._nodes
        self._plain = tokens - self._nodes == len(work)
        self._forward = seconds
        if self._nodes:
            self.verified += 1
            self.verify_seconds += seconds
        if self._plain:
            if behind and self.cost:
                self.overhead.note_after(seconds, self.cost.seconds(tokens))
            self.cost.note(tokens, seconds)
        else:
            self.cost.note_prompt(tokens, seconds)

    def stepped(self, seconds: float, tokens: int) -> None:
        """Note what the step took in all, and how many tokens it gave."""
        self.tidy()
        if not self.speculators:
            return
        if self._resting:
            self._rested.append(seconds)
            return
        seconds, rested = self.measured(seconds), self.measured(sum(self._rested)) if self._rested else 0.0
        self._rested.clear()
        for speculator in self.speculators.values():
            speculator.stepped(tokens, seconds if self._plain else 0.0, rested)
        if self._plain:
            spent = sum(drafter.seconds for drafter in self.drafters) - self._drafted
            self.overhead.note(max(seconds - self._forward - spent, 0.0), self._nodes)

    def settle(self, work: Rows[PlanRow], drawings: Rows[Drawing], logits: torch.Tensor, sound: bool) -> None:
        """KV of accepted drafts goes to its place and is committed; pages of the others are released.

        Args:
            sound: whether all logits are finite.
        """
        planned_of = {planned.row: planned for planned in work}
        judged = [(planned_of[drawing.row], drawing) for drawing in drawings if drawing.proposal is not None]
        alive = [(planned, drawing) for planned, drawing in judged if drawing.row.sequence is not None]
        self._clean(alive, logits, sound)
        for planned, drawing in judged:
            sequence = drawing.row.sequence
            if sequence is None:  # its request failed
                continue
            computed = sequence.computed
            # The last token's KV is never stored: a draft that ended the row is not committed.
            accepted = min(len(drawing.path), sequence.pending - 1)
            self.memory.commit(sequence, accepted)
            self.memory.rollback(sequence, sequence.computed)
            if drawing.row.request.speculator is not None:  # another row of the request may have given drafting up
                drawing.row.request.speculator.judge(planned, drawing.verdict, computed - 1)

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

    def stats(self, recorder: Recorder) -> SpeculationStats:
        """What became of all drafts; `recorder` knows the rest of the time."""
        return collect(self.speculators.values(), self.drafters, self.verified, self.verify_seconds, recorder)

    def reset_stats(self) -> None:
        """Begin counting anew."""
        self.verified, self.verify_seconds = 0, 0.0
        for speculator in self.speculators.values():
            speculator.tallies.clear()
        for drafter in self.drafters:
            drafter.seconds = 0.0

    def ended(self, row: Row) -> None:
        """A row has ended."""
        if row.request.speculator is not None:
            row.request.speculator.ended(row)
