"""The loop's side of speculation: drafts into the plan, accepted ones into memory, rejected ones out of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from math import inf

import torch

from hf_paged.draft_slots import DraftSlots, with_drafts
from hf_paged.kernels.native_verified import Visit
from hf_paged.memory import Memory
from hf_paged.plan import PlanRow
from hf_paged.proposers import Proposers
from hf_paged.speculation.cost import KNOWN, CostTable
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.proposal import Proposal
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.stats import SpeculationStats, collect
from hf_paged.speculation.verify import Drawing
from hf_paged.speculation.visit import Plan, Step, Visits
from hf_paged.stats import Recorder
from hf_paged.store import KVStore

Visited = tuple[Plan, Visit, list[Step]]

REST = 3  # steps without any speculation behind one in which there was nothing to do, or as many as make a burst


class Drafting(Proposers):
    """Speculation in one engine.

    Args:
        store: the engine's KV. The others are as in `Proposers`.

    Attributes:
        burst: steps that can be made at once.
        leisure: steps, this one included, in which there is nothing to do.
    """

    def __init__(self, memory: Memory, store: KVStore, measured: Callable[[float], float] | None = None) -> None:
        super().__init__(memory, measured)
        self.slots = DraftSlots(memory, store, self.drafters)
        self.verified, self.verify_seconds = 0, 0.0  # forwards with drafts
        self._plain = False  # whether the latest step held no prompt
        self._before = 0  # drafts of the step before
        self._nodes, self._forward, self._drafted = 0, 0.0, 0.0
        self._rest, self._resting, self._rows = 0, False, 0  # steps left of a rest; whether this is one; its rows
        self._steps = 1  # of this visit
        self._rested, self._rested_seconds = 0, 0.0  # steps since it was asked last
        self.burst = self.leisure = 0
        self._visits: dict[Speculator, Visits] = {}
        self._visited: Visited | None = None
        self._burst_rows = 0  # of the latest steps, if these were made at once, without drafts
        self._bursts = CostTable()  # such steps as a whole, by rows
        self._paces: dict[int, float] = {}  # that of forwards of like many rows, when the latest of these were made
        self._late = 0.0  # seconds that it took to learn from a visit: the next one's, since this one's are counted

    def drop(self, drafter: Drafter) -> None:
        super().drop(drafter)
        self._visits = {known: visits for known, visits in self._visits.items() if known.drafter is not drafter}
        self._visited = None

    # -- before the forward

    def propose(
        self, work: list[PlanRow], most: int, waits: bool, soon: int
    ) -> tuple[list[PlanRow], dict[PlanRow, Proposal]]:
        """`work` with drafts behind the last tokens of rows, up to `most` tokens in all, and these drafts.

        Args:
            waits: whether rows wait for the places of these. soon: rows that decode once prompts have been read.
        """
        self._nodes, self._steps, self.leisure, self._burst_rows = 0, 1, 0, 0
        if not self.speculators or self._rests(len(work)):
            self.leisure = 1 + self._rest
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
            speculator.rested(self._rested)
            made = speculator.propose(rows, tokens, drawn, most - tokens, waits, soon, self.slots.reserve)
            tokens += sum(map(len, made.values()))
            found |= made
        free = min((speculator.free for speculator in groups), default=0)
        if free:
            self._rest = min(max(self.burst - 1, REST), free - 1)
            self.leisure = 1 + self._rest
        self._nodes = sum(map(len, found.values()))
        if not found:
            return work, found
        wider = [with_drafts(planned, found.get(planned)) for planned in work]
        drafts = {new: found[old] for old, new in zip(work, wider, strict=True) if old in found}
        # Decodes first, then drafts, then prompts.
        wider.sort(key=lambda planned: 0 if planned.count == 1 else 1 if planned in drafts else 2)
        return wider, drafts

    def _rests(self, rows: int) -> bool:
        """Whether the step goes without: what there was to do would cost more than comes of it."""
        self._resting = self._rest > 0 and rows == self._rows
        self._rest, self._rows = self._rest - 1 if self._resting else 0, rows
        return self._resting

    def visits(self, work: Rows[PlanRow], soon: int) -> Visits | None:
        """What plans several steps of `work` with drafts at once; None where they are made one by one.

        Args:
            soon: see `propose`.
        """
        found = {planned.row.request.speculator for planned in work}
        if len(found) != 1 or None in found or (self._rest and len(work) == self._rows):
            return None
        (speculator,) = found
        visits = self._visits.get(speculator)
        if visits is None:
            visits = self._visits[speculator] = Visits(speculator, self._bursts)
        return visits if visits.serve(soon) else None

    def visit(self, visits: Visits, work: Rows[PlanRow], most: int, waits: bool, soon: int) -> Plan | None:
        """Several steps of `work`, with drafts; None: they are to be made one by one. Arguments: see `propose`."""
        speculator = visits.speculator
        if visits.stale():
            visits.since, self._rest, self._rows = 0, max(self.burst, REST), len(work)
            return None
        speculator.rested(self._rested)
        speculator.texts.stepped(self._rested_seconds)
        self._rested, self._rested_seconds = 0, 0.0
        return visits.plan(work, most - len(work), waits, soon)

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
            usual = self.cost.of(len(work)).seconds(tokens)
            if behind and usual:
                self.overhead.note_after(seconds, usual)
            self.cost.note(len(work), tokens, seconds)
        else:
            self.cost.note_prompt(tokens, seconds)

    def made(self, work: Rows[PlanRow], steps: int, seconds: float) -> None:
        """So many steps without drafts were made at once; their forwards took so long in all."""
        count = len(work)
        for _ in range(min(steps, KNOWN)):
            if self._resting:
                self.cost.note(count, count, self.measured(seconds / steps))
            self.forwarded(work, count, seconds / steps)
        self._forward, self._burst_rows = self.measured(seconds / steps), count
        rest = self._rest - steps + 1
        self._steps, self._rest = steps, rest if rest + 1 >= self.burst else 0  # a short one would cut a burst short

    def stepped(self, seconds: float, tokens: int) -> None:
        """Note what the step took in all, and how many tokens it gave. Of several the first may be none of a rest."""
        self.tidy()
        if not self.speculators:
            return
        visited, self._visited = self._visited, None
        if visited is not None:
            begun = time.perf_counter()
            self._learn(visited, self.measured(seconds + self._late))
            self._late = time.perf_counter() - begun
            return
        steps, rested = self._steps, self._rested_seconds
        seconds, tokens = self.measured(seconds) / steps, tokens / steps
        if self._burst_rows:
            self._bursts.note(self._burst_rows, seconds)
            self._paces[self._burst_rows.bit_length()] = self.cost.of(self._burst_rows).pace
            for visits in self._visits.values():
                visits.overhead.note(max(seconds - self._forward, 0.0), 0)
                visits.since = 0
        if self._resting:
            self._rested, self._rested_seconds = self._rested + steps, rested + steps * seconds
            return
        self._rested, self._rested_seconds = steps - 1, (steps - 1) * seconds
        for speculator in self.speculators.values():
            speculator.stepped(tokens, seconds if self._plain else 0.0, self._usual(self._rows), rested)
        if self._plain:
            spent = sum(drafter.seconds for drafter in self.drafters) - self._drafted
            self.overhead.note(max(seconds - self._forward - spent, 0.0), self._nodes)

    def _usual(self, rows: int) -> float:
        """Seconds, at the machine's present pace, of a step of so many rows where many are made at once without drafts;
        infinite where none was of as many."""
        size = min((size for size in self._paces if size >= rows.bit_length()), default=0)
        seconds = self._bursts.seconds(rows) if size else 0.0
        return seconds * self.cost.of(1 << size - 1).pace / self._paces[size] if seconds else inf

    def wrote(self, plan: Plan, visit: Visit) -> None:
        """KV of a visit's steps is stored, on the pages that its rows have now."""
        self._visits[plan.speculator].settle(plan, visit)

    def visited(self, plan: Plan, visit: Visit, steps: list[Step]) -> None:
        """Steps of a visit were taken; what became of drafts is learned when all that it took is known."""
        visits = self._visits[plan.speculator]
        visits.since += 1
        self._visited, self._rest, self._rows = (plan, visit, steps), 0, len(plan.work)

    def _learn(self, visited: Visited, seconds: float) -> None:
        plan, visit, steps = visited
        visits, made = self._visits[plan.speculator], visit.seconds[: len(steps)]
        self._rest = visits.rest(steps, seconds, plan) * self.burst
        each = max(seconds - sum(forward + spent for forward, spent in made), 0.0) / max(len(steps), 1)
        self._resting = False
        drafted = any(step.verdicts for step in steps)
        if not (drafted or plan.speculator.has_drafter):  # they are all alike
            count = len(steps)
            forward, tokens = sum(forward for forward, _ in made) / count, sum(step.tokens for step in steps) / count
            made, steps = [(forward, 0.0)], [Step(len(plan.work), tokens, [])]
            plan.speculator.rested(count - 1)
            plan.speculator.texts.stepped((count - 1) * (forward + each))
        for index, ((forward, spent), step) in enumerate(zip(made, steps, strict=True)):
            self._nodes = sum(len(verdict.proposal) for _, verdict in step.verdicts)
            self.forwarded(plan.work[: step.rows], step.rows + self._nodes, forward)
            visits.learn(plan, index, step.verdicts, visit)
            plan.speculator.stepped(step.tokens, forward + spent + each, self._usual(step.rows))
            if drafted:
                visits.overhead.note(each, max(self._nodes, 1))
        visits.looked(plan, steps)

    def settle(self, work: Rows[PlanRow], drawings: Rows[Drawing], logits: torch.Tensor, sound: bool) -> None:
        """KV of accepted drafts goes to its place; see `DraftSlots.settle`. Proposers learn what became of theirs."""
        for planned, drawing, computed in self.slots.settle(work, drawings, logits, sound):
            if drawing.row.request.speculator is not None:  # another row of the request may have given drafting up
                drawing.row.request.speculator.judge(planned, drawing.verdict, computed - 1)

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
