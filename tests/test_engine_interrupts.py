"""Interrupts at any place, over the toy model: what goes on gives the same tokens, no page is lost or spoilt."""

import pytest
from engine_helpers import (
    POISON,
    alone,
    assert_as_alone,
    assert_finite,
    assert_idle,
    run,
    submit_all,
    submitted,
    tokens_of,
    toy_core,
)

import hf_paged.engine
import hf_paged.outcomes
import hf_paged.roster
from hf_paged.params import SamplingParams
from hf_paged.scheduler import Decision
from hf_paged.scoring import Scoring, ScoringError


class Bomb:
    """Calls through, and raises KeyboardInterrupt at the n-th call, before or after it."""

    def __init__(self, target, at, after):
        self.target, self.left, self.after = target, at, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        out = self.target(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return out


PLACES = [
    "memory.reserve",
    "memory.commit",
    "memory.fork",
    "memory.open",
    "memory.close",
    "memory.pool.take",
    "memory.pool.share",
    "memory.pool.release",
    "store.copy",
    "store.scrub",
    "forward",
    "roster.admit",
    "roster.branch",
    "roster.preempt",
    "roster.finish",
    "roster._wait",
    "roster._unwait",
    "roster._release",
    "roster._report",
    "recorder.memory",
    "recorder.add",
    "outcomes.decode",
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place", [*PLACES, "draw", "build_plan", "append_drawn", "check_finished"])
def test_an_interrupt_anywhere_loses_nothing(monkeypatch, place, after):
    """Ctrl-C before or after any call of a step: the step raises; going on gives the same tokens; no page is lost."""
    for at in (1, 2, 3, 5, 8, 13):
        core = toy_core(11, 3, max_batch_tokens=12, max_sequences=4)
        requests = submit_all(core, (5, 9, 4), max_tokens=7, stop="zz")
        requests += [core.submit([7, 8, 9], SamplingParams(n=6, max_tokens=5, logprobs=1), seed=3)]
        requests += [core.submit([7, 8, 9], SamplingParams(n=3, max_tokens=1, prompt_logprobs=1), seed=3)]
        expected = [alone(*submitted(request)) for request in requests]
        with monkeypatch.context() as patch:
            owner, _, name = place.rpartition(".")
            target = core
            for part in filter(None, owner.split(".")):
                target = getattr(target, part)
            if owner or hasattr(core, name):
                patch.setattr(target, name, Bomb(getattr(target, name), at, after))
            else:
                module = hf_paged.engine if hasattr(hf_paged.engine, name) else hf_paged.outcomes
                patch.setattr(module, name, Bomb(getattr(module, name), at, after))
            raised = False
            while core.has_work and not raised:
                try:
                    core.step()
                except KeyboardInterrupt:
                    raised = True
        assert_finite(core)
        if at % 2:
            run(core)
            for request, other in zip(requests, expected, strict=True):
                assert tokens_of(request) == tokens_of(other) and request.ended and request.error is None
                assert request.prompt_logprobs == other.prompt_logprobs
                assert [len(row.logprobs) for row in request.rows] == [len(row.logprobs) for row in other.rows]
        else:
            for request in core.requests:
                core.cancel(request.request_id)
        run(core)
        assert_idle(core)


@pytest.mark.parametrize("name", ["append_drawn", "check_finished"])
def test_an_interrupt_while_the_last_tokens_are_handed_out(monkeypatch, name):
    module = hf_paged.outcomes
    for at in range(1, 16):
        core = toy_core()
        params = [
            SamplingParams(n=2, max_tokens=3, logprobs=1),
            SamplingParams(max_tokens=9, stop_token_ids=[4, 5, 6, 7]),
            SamplingParams(max_tokens=9, stop=["c", "de"]),
        ]
        requests = [core.submit([1, 2, i], p, seed=i) for i, p in enumerate(params)]
        with monkeypatch.context() as patch:
            patch.setattr(module, name, Bomb(getattr(module, name), at, after=True))
            with pytest.raises(KeyboardInterrupt):
                run(core)
        run(core)
        for request in requests:
            other = alone(*submitted(request))
            for row, expected in zip(request.rows, other.rows, strict=True):
                assert row.output_ids == expected.output_ids and row.logprobs == expected.logprobs
                assert (row.finish_reason, row.stop_reason) == (expected.finish_reason, expected.stop_reason)


def test_an_interrupt_before_pages_are_copied(monkeypatch):
    """Tables point to the new pages already, which hold nothing yet."""
    core = toy_core(page_size=4)
    request = core.submit([1, 2, 3, 4, 5, 6], SamplingParams(n=3, max_tokens=4), seed=0)
    core.step()
    monkeypatch.setattr(core.store, "copy", Bomb(core.store.copy, 1, after=False))
    with pytest.raises(KeyboardInterrupt):
        core.step()
    run(core)
    assert_as_alone([request])


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_kv_that_is_not_good_is_forgotten(monkeypatch, after):
    """A row is preempted before its logits say that its text has gone wrong; its pages are in the tree already."""
    core = toy_core(8, 1, max_batch_tokens=1, prefix_caching=True)
    bad = core.submit_scoring([POISON, 1], Scoring(2, (0,)), SamplingParams(max_tokens=1))
    other = core.submit([1], SamplingParams(max_tokens=8), seed=0)
    core.step()
    with monkeypatch.context() as patch:
        patch.setattr(core, "_decide", lambda: Decision(preempted=(bad.rows[0],)))
        patch.setattr(core.memory.prefixes, "discard", Bomb(core.memory.prefixes.discard, 1, after))
        with pytest.raises(KeyboardInterrupt):
            core.step()
    assert_finite(core)
    run(core)
    assert_as_alone([other])
    assert isinstance(bad.error, ScoringError)
    assert_idle(core)


def test_a_cancelled_request_whose_bad_scores_were_not_reported_yet(monkeypatch):
    """An interrupt between the scores and their error: its KV is not good all the same, nor are its scores later."""
    core = toy_core(9, 1, prefix_caching=True)
    requests = [
        core.submit_scoring([1, POISON, 2, 3], Scoring(1, (0,)), SamplingParams(max_tokens=1, cache_salt=salt))
        for salt in "ab"
    ]
    monkeypatch.setattr(core.memory.pool, "keep", Bomb(core.memory.pool.keep, 1, after=False))
    with pytest.raises(KeyboardInterrupt):
        core.step()
    core.cancel(requests[0].request_id)
    assert_finite(core)
    run(core)
    assert isinstance(requests[1].error, ScoringError) and "behind token 1 are NaN" in str(requests[1].error)
    assert_idle(core)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "place", ["roster._release", "roster._unwait", "roster._report", "memory.close", "store.scrub"]
)
def test_an_interrupted_cancellation(monkeypatch, place, after):
    """The request has ended or goes on; nothing is left of one that has ended, and the others are as they were."""
    core = toy_core(16, 2, max_batch_tokens=8, max_sequences=3, prefix_caching=True)
    bad, *others = [core.submit([1, i], SamplingParams(n=2, max_tokens=5), seed=i) for i in range(3)]
    core.step()
    core.step()
    *path, name = place.split(".")
    owner = getattr(core, path[0])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Bomb(getattr(owner, name), 1, after))
        with pytest.raises(KeyboardInterrupt):
            core.cancel(bad.request_id)
    assert_finite(core)
    assert bad.ended == (bad not in core.requests) and core.requests[-2:] == others
    run(core)
    assert_as_alone(others if bad.rows[0].finish_reason == "cancelled" else [bad, *others])
    assert_idle(core)


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_a_request_is_queued_or_a_list_is_arranged(monkeypatch, after):
    core = toy_core(prefix_caching=True)
    requests = submit_all(core, (5, 9, 4), max_tokens=7)
    with monkeypatch.context() as patch:
        patch.setattr(core.roster, "_wait", Bomb(core.roster._wait, 1, after))
        with pytest.raises(KeyboardInterrupt):
            core.submit([1, 2], SamplingParams(), seed=0)
    assert core.requests == requests
    core.check()
    with monkeypatch.context() as patch:
        patch.setattr("hf_paged.roster._last_first", Bomb(hf_paged.roster._last_first, 2, after))
        with pytest.raises(KeyboardInterrupt):
            core.arrange(requests)
    core.check()
    run(core)
    assert_as_alone(requests)
