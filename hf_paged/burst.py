"""Several decode steps at one visit of the host: a stepper runs them on its device, their tokens are taken here.

Tokens are fed on the device, so a row may end in the middle: what was drawn for it after that is thrown away, and its
slots are those of pages that it gives back. The tokens are those that the loop gives step by step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hf_paged.kernels.native_verified import NODES, Made, Visit
from hf_paged.plan import PlanRow
from hf_paged.sampling import SampleResult, drawn_errors
from hf_paged.speculation.visit import MOST, Plan, Step, verdict_of

if TYPE_CHECKING:
    from hf_paged.engine import EngineCore
    from hf_paged.outcomes import StepResult


class Stepper(Protocol):
    """Decodes on a device. `most`: steps at once, where nobody waits; 0: it does not serve."""

    @property
    def most(self) -> int: ...

    def run(self, rows: Sequence[PlanRow], steps: int) -> Iterator[tuple[list[int], list[float]]] | None:
        """Begin `steps` decode steps of rows whose pages are reserved; None where it cannot.

        Yields for each step the token of every row, and the largest of its logits over the temperature: where that is
        not finite there is no token. There may be fewer steps. A row's slots behind its pages go to page 0.
        """
        ...

    @property
    def lines(self) -> int:
        """Tokens, drafts among them, that `verify` takes in one step."""
        ...

    @property
    def slots(self) -> int:
        """Slots of a row that `verify` takes."""
        ...

    def verify(self, plan: Plan) -> Visit | None:
        """Steps with drafts, as `plan` has them; None where it cannot."""
        ...


WHILE_OTHERS_WAIT = 8  # steps at once, at most: a row that ends makes room for another
TOKENS_A_STEP = 4  # for which a visit with drafts takes pages: behind these it ends


def burst_length(work: Sequence[PlanRow], core: EngineCore) -> int:
    """Steps that these rows can do at once; 0 where one of them needs the host between its steps."""
    drafted = any(planned.row.request.speculator is not None for planned in work)
    most = min(core.stepper.most, core.drafting.leisure) if drafted else core.stepper.most
    if not most or not all(_simple(planned) for planned in work):
        return 0
    left = np.array([planned.row.left for planned in work])
    waits = len(core.roster.running) > len(work) or core.roster.waits
    steps = int(min(most, WHILE_OTHERS_WAIT, left.min()) if waits else min(most, left.max()))
    while steps > 1 and _fresh(core, work, np.minimum(steps, left)).sum() > core.memory.available:
        steps //= 2
    for at in np.flatnonzero(_fresh(core, work, np.minimum(steps, left))).tolist():
        core.store.copy(core.memory.reserve(work[at].sequence, int(min(steps, left[at]))))
    return steps


def _fresh(core: EngineCore, work: Sequence[PlanRow], slots: np.ndarray) -> np.ndarray:
    """Pages that each row must take for so many more slots. (Its last one is its own: a slot of it is reserved.)"""
    computed = np.array([planned.sequence.computed for planned in work])
    held = np.array([len(planned.sequence.pages) for planned in work])
    return np.maximum(core.memory.pages_for(computed + slots) - held, 0)


def _simple(planned: PlanRow) -> bool:
    """Whether a row decodes, and its tokens follow from its logits, its parameters and its noise alone."""
    row, params = planned.row, planned.row.request.params
    sampling = row.sampling
    return (
        planned.count == planned.logits == 1
        and planned.sequence.pending == 1
        and bool(row.output_ids)
        and params.plain
        and sampling.params.logprobs is None
        and sampling.pipeline is None
        and not sampling.bad_word_ids
        and len(row.output_ids) >= params.min_tokens
        and row.hooks.replace is None
        and not (sampling.keep_logits or sampling.keep_scores)
    )


def run_burst(core: EngineCore, work: Sequence[PlanRow], result: StepResult) -> bool:
    """Run a step's rows that all decode, several steps at once. False: they must go the long way."""
    steps = burst_length(work, core)
    if not steps:
        return False
    drawn = core.stepper.run(work, steps)
    if drawn is None:
        for planned in work:
            _give_back(core, planned, again=True)
        return False
    alive = list(enumerate(work))
    begun, before, done = time.perf_counter(), core.recorder.forward_seconds, 0
    for tokens, tops in drawn:
        done += 1
        core.recorder.forward(len(alive), time.perf_counter() - begun)
        alive = _take_step(core, alive, SampleResult(tokens, drawn_errors(tops)), result)
        if not alive:
            break
        begun = time.perf_counter()
    core.drafting.made(work, done, core.recorder.forward_seconds - before)
    for _, planned in alive:  # where there were fewer steps: pages for those that were not made
        _give_back(core, planned)
    core.recorder.memory(len(core.roster.running), core.memory.pool.held, core.memory.live_tokens)
    return True


def run_visit(core: EngineCore, work: Sequence[PlanRow], soon: int, result: StepResult) -> bool:
    """Run a step's rows that all decode and for which there is a speculator, several steps with drafts at once. False:
    they must go the long way."""
    visits = core.drafting.visits(work, soon) if core.stepper.most else None
    if visits is None or not all(_simple(planned) for planned in work):
        return False
    if len({planned.sequence.pages[0] for planned in work}) < len(work):
        return False  # rows with pages in common are computed together
    most = min(core.settings.max_batch_tokens, core.stepper.lines)
    longest = max(planned.sequence.computed for planned in work) + MOST * TOKENS_A_STEP + NODES
    if longest > core.stepper.slots:
        return False
    waits = core.roster.waits or len(core.roster.running) > len(work)
    plan = core.drafting.visit(visits, work, most, waits, soon)
    if plan is None:
        return False
    plan.steps = min(plan.steps, core.stepper.most, WHILE_OTHERS_WAIT if waits else plan.steps)
    _make_room(core, plan)
    visit = core.stepper.verify(plan)
    steps: list[Step] = []
    if visit is not None:
        core.drafting.wrote(plan, visit)
        for each, (seconds, _) in zip(visit.steps, visit.seconds, strict=True):
            core.recorder.forward(sum(1 + len(made.tokens) for made in each if made.drawn), seconds)
            steps.append(_take_drafts(core, plan, each, result))
            if all(planned.row.sequence is None for planned in work):
                break  # stops that the compiled steps did not know of
    for planned in work:
        if planned.row.sequence is not None:
            _give_back(core, planned, not steps, visit is not None and visit.spoilt)
    if not steps:
        return False
    core.drafting.visited(plan, visit, steps)
    core.recorder.memory(len(core.roster.running), core.memory.pool.held, core.memory.live_tokens)
    return True


def _make_room(core: EngineCore, plan: Plan) -> None:
    """Reserve slots for the steps and the drafts of a visit. Drafts never take the pages of another row."""
    memory, wanted = core.memory, plan.steps * TOKENS_A_STEP + plan.deepest
    left = np.array([row.left for row in plan.rows])
    while _fresh(core, plan.work, np.minimum(wanted, left)).sum() > memory.available:
        wanted //= 2
    for planned, row in zip(plan.work, plan.rows, strict=True):
        copies = memory.reserve(planned.sequence, max(min(wanted, row.left), 1))
        core.store.copy(copies)
        core.drafting.copied(copies)
        row.slots = len(planned.sequence.pages) * memory.page_size


def _give_back(core: EngineCore, planned: PlanRow, again: bool = False, spoilt: bool = False) -> None:
    """Release pages behind what was computed.

    Args:
        again: the next token's slot is still needed. spoilt: numbers that are not finite may have been stored.
    """
    memory, sequence = core.memory, planned.sequence
    if spoilt:
        slots = range(sequence.computed, len(sequence.pages) * memory.page_size)
        core.store.clear(np.array([sequence.slot(place, memory.page_size) for place in slots]))
    memory.rollback(sequence, sequence.computed)
    if again:
        memory.reserve(sequence, 1)


def _take_drafts(core: EngineCore, plan: Plan, made: Sequence[Made], result: StepResult) -> Step:
    """Take what one step of a visit made of its rows."""
    before, rows, verdicts = len(result.ids), 0, []
    for planned, each in zip(plan.work, made, strict=True):
        row, sequence = planned.row, planned.sequence
        if row.finish_reason or row.sequence is None or not each.drawn:
            continue
        rows += 1
        core.memory.commit(sequence, 1)
        taken, sampled = 0, SampleResult(each.drawn, [None] * len(each.drawn))
        goes = True
        while goes and taken < len(each.drawn):
            goes = core.outcomes.take(result, row, sampled, taken)
            taken += 1
        if row.sequence is None:  # its request failed
            continue
        verdict = verdict_of(plan, each, taken, not goes)
        if verdict is not None:
            verdicts.append((planned, verdict))
            core.memory.commit(sequence, verdict.accepted)
        if row.finish_reason:
            core.outcomes.finish(row)
    generated = len(result.ids) - before
    core.recorder.add(steps=1, rows=rows, generated_tokens=generated)
    return Step(rows, generated, verdicts)


def _take_step(
    core: EngineCore, alive: list[tuple[int, PlanRow]], sampled: SampleResult, result: StepResult
) -> list[tuple[int, PlanRow]]:
    """Commit what one step computed and take its tokens; the rows that go on."""
    for _, planned in alive:
        core.memory.commit(planned.sequence, 1)
    before = len(result.ids)
    goes_on = [core.outcomes.take(result, planned.row, sampled, place) for place, planned in alive]
    generated = len(result.ids) - before
    for _, planned in alive:
        if planned.row.finish_reason and planned.row.sequence is not None:
            core.outcomes.finish(planned.row)
    core.recorder.add(steps=1, rows=len(alive), generated_tokens=generated)
    left = (entry for entry, goes in zip(alive, goes_on, strict=True) if goes)
    return [entry for entry in left if entry[1].row.sequence is not None]
