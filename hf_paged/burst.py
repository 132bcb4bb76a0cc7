"""Several decode steps at one visit of the host: a stepper runs them on its device, their tokens are taken here.

Tokens are fed on the device, so a row may end in the middle: what was drawn for it after that is thrown away, and its
slots are those of pages that it gives back. The tokens are those that the loop gives step by step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hf_paged.plan import PlanRow
from hf_paged.sampling import SampleResult, drawn_errors

if TYPE_CHECKING:
    from hf_paged.engine import EngineCore
    from hf_paged.outcomes import StepResult


class Stepper(Protocol):
    """Decodes on a device. `most`: steps at once, where nobody waits."""

    most: int

    def run(self, rows: Sequence[PlanRow], steps: int) -> Iterator[tuple[list[int], list[float]]] | None:
        """Begin `steps` decode steps of rows whose pages are reserved; None where it cannot.

        Yields for each step the token of every row, and the largest of its logits over the temperature: where that is
        not finite there is no token. A row's slots behind its pages go to page 0.
        """
        ...


WHILE_OTHERS_WAIT = 8  # steps at once, at most: a row that ends makes room for another


def burst_length(work: Sequence[PlanRow], core: EngineCore) -> int:
    """Steps that these rows can do at once; 0 where one of them needs the host between its steps."""
    if not all(_simple(planned) for planned in work):
        return 0
    left = np.array([planned.row.request.max_tokens - len(planned.row.output_ids) for planned in work])
    waits = len(core.roster.running) > len(work) or core.roster.waits
    most = min(WHILE_OTHERS_WAIT, left.min()) if waits else left.max()
    steps, memory = int(min(core.stepper.most, most)), core.memory
    computed = np.array([planned.sequence.computed for planned in work])
    held = np.array([len(planned.sequence.pages) for planned in work])

    def fresh(steps: int) -> np.ndarray:
        """Pages that each row must take. (Its last one is its own: a slot of it is reserved.)"""
        return np.maximum(memory.pages_for(computed + np.minimum(steps, left)) - held, 0)

    while steps > 1 and fresh(steps).sum() > memory.available:
        steps //= 2
    for at in np.flatnonzero(fresh(steps)).tolist():
        core.store.copy(memory.reserve(work[at].sequence, int(min(steps, left[at]))))
    return steps


def _simple(planned: PlanRow) -> bool:
    """Whether a row decodes, and its tokens follow from its logits, its parameters and its noise alone."""
    row, params = planned.row, planned.row.request.params
    sampling = row.sampling
    return (
        planned.count == planned.logits == 1
        and planned.sequence.pending == 1
        and bool(row.output_ids)
        and row.request.speculator is None
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
        for planned in work:  # of what was reserved, one slot is needed
            core.memory.rollback(planned.sequence, planned.sequence.computed)
            core.memory.reserve(planned.sequence, 1)
        return False
    alive = list(enumerate(work))
    begun = time.perf_counter()
    for tokens, tops in drawn:
        core.recorder.forward(len(alive), time.perf_counter() - begun)
        alive = _take_step(core, alive, SampleResult(tokens, drawn_errors(tops)), result)
        if not alive:
            break
        begun = time.perf_counter()
    core.recorder.memory(len(core.roster.running), core.memory.pool.held, core.memory.live_tokens)
    return True


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
