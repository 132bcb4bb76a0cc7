"""An interrupt before every line that the engine runs, over the toy model: all laws hold, tokens are as undisturbed."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
from engine_helpers import POISON, assert_finite, assert_idle, run, toy_core, toy_drafter

import hf_paged
from hf_paged.params import SamplingParams
from hf_paged.scoring import Scoring
from hf_paged.speculation.config import SpeculationConfig

PACKAGE = str(Path(hf_paged.__file__).parent)


class Tracer:
    """Notes where each line of the package runs in a call, or raises KeyboardInterrupt before the `at`-th."""

    def __init__(self, at=None):
        self.at, self.count, self.seen = at, 0, defaultdict(list)
        self.place = None

    def __call__(self, frame, event, argument):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, argument):
        if event == "line" and self.place is None:
            self.count += 1
            place = Path(frame.f_code.co_filename).stem, frame.f_lineno
            self.seen[place].append(self.count)
            if self.count == self.at:
                self.place = place
                raise KeyboardInterrupt
        return self.line


def plain():
    """Preemption, forks, shared prefixes, a text that goes wrong, scores, priorities."""
    core = toy_core(12, 2, max_batch_tokens=7, max_sequences=4, prefix_caching=True)
    core.submit([1, 2, 3, 4, 5], SamplingParams(n=2, max_tokens=6, logprobs=1), seed=0)
    core.submit([1, 2, 3, 4, 6], SamplingParams(max_tokens=5, prompt_logprobs=1, priority=1.0, stop="ab"), seed=1)
    core.submit([1, 2, POISON, 3], SamplingParams(max_tokens=4), seed=2)
    core.submit_scoring([1, 2, 3, 4, 5, 6, 7], Scoring(2, (0, 1)), SamplingParams(max_tokens=1))
    core.submit([1, 2, 3, 4, 5], SamplingParams(max_tokens=9, cache_salt="a", temperature=0.0), seed=4)
    return core


def drafting():
    """Drafts of a model, in trees, with right ones and wrong ones."""
    core = toy_core(14, 2, max_batch_tokens=24, max_sequences=3, prefix_caching=True)
    drafter = toy_drafter(core)
    config = SpeculationConfig(method="draft", adaptive=False, max_draft_tokens=3, tree_width=2)
    for i in range(3):
        speculator = core.drafting.speculator(config, drafter)
        core.submit([1, 2, i], SamplingParams(max_tokens=7), seed=i, speculator=speculator)
    return core


def step(core, number):
    """The step of this number, and what happens before some of them."""
    if number == 3 and core.requests:
        core.cancel(core.requests[-1].request_id)
    if number == 5:
        core.forget()
    core.step()


def drive(core, tracer):
    """Step under the tracer until it raises, or nothing is left."""
    number = 0
    while core.has_work and tracer.place is None:
        number += 1
        sys.settrace(tracer)
        try:
            step(core, number)
        except KeyboardInterrupt:
            assert tracer.place is not None
        finally:
            sys.settrace(None)


def outcome(request):
    """What must not depend on an interrupt."""
    if request.scoring is not None:
        return request.error, request.scoring.logprobs
    return type(request.error), request.error is None and [row.output_ids for row in request.rows]


def undisturbed(make):
    """Outcomes of the requests of `make` without anything that happens beside them."""
    core = make()
    requests = core.requests
    run(core)
    return [outcome(request) for request in requests]


def interrupt(make, at, expected):
    """An interrupt before line number `at`: laws hold right after it, and later each outcome is as expected."""
    core, tracer = make(), Tracer(at)
    requests = core.requests
    drive(core, tracer)
    try:
        assert_finite(core)
        while core.has_work:
            core.step()
        assert_idle(core)
        for request, other in zip(requests, expected, strict=True):
            assert request.ended and (cancelled(request) or outcome(request) == other)
    except AssertionError as error:
        raise AssertionError(f"interrupted before {tracer.place}, line number {at}") from error


def cancelled(request):
    return any(row.finish_reason == "cancelled" for row in request.rows)


def lines(make):
    """The number of one of the times that each line runs, in the middle of them."""
    tracer = Tracer()
    drive(make(), tracer)
    return sorted(found[len(found) // 2] for found in tracer.seen.values())


@pytest.mark.parametrize("make", [plain, drafting])
def test_before_some_lines(make):
    expected, places = undisturbed(make), lines(make)
    assert len(places) > 1000
    for at in places[::20]:
        interrupt(make, at, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, drafting])
def test_before_every_line(make):
    expected = undisturbed(make)
    for at in lines(make):
        interrupt(make, at, expected)
