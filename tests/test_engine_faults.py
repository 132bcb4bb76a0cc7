"""Cancellation, failures, interrupts and edges, over the toy model: nobody else is harmed, no page is lost."""

import math
import random

import pytest
from engine_helpers import (
    GREEDY,
    POISON,
    VOCAB,
    assert_as_alone,
    assert_finite,
    assert_idle,
    run,
    submit_all,
    tokens_of,
    toy_core,
)

from hf_paged.params import SamplingParams
from hf_paged.request import RowHooks

# -- cancellation


def test_cancel_while_waiting_prefilling_and_running():
    core = toy_core(max_batch_tokens=8, max_sequences=2)
    running, prefilling, waiting, kept = submit_all(core, (3, 30, 5, 4), max_tokens=9)
    core.step()
    core.step()
    assert running.rows[0].output_ids and not prefilling.rows[0].output_ids and waiting.rows[0].sequence is None
    assert prefilling.rows[0].sequence.computed
    for request in (prefilling, waiting, running):
        assert core.cancel(request.request_id) and not core.cancel(request.request_id)
        core.check()
        assert request.ended and request.rows[0].finish_reason == "cancelled" and request.rows[0].sequence is None
    assert core.memory.pool.used == 0
    assert core.step().finished == [prefilling, waiting, running]
    run(core)
    assert_as_alone([kept])
    assert not core.cancel(kept.request_id) and not core.cancel("nobody")
    assert_idle(core)


def test_cancel_a_request_of_several_rows():
    core = toy_core(6, 2, max_sequences=3)
    request = core.submit([1, 2, 3], SamplingParams(n=5, max_tokens=6), seed=0)
    for _ in range(3):
        core.step()
    assert core.cancel(request.request_id)
    assert {row.finish_reason for row in request.rows} == {"cancelled"}
    run(core)
    assert_idle(core)


def test_cancel_from_within_a_step_ends_at_once():
    """A hook that cancels its own request, or another, while tokens are being handed out."""
    core = toy_core()
    other = core.submit([4, 5], SamplingParams(max_tokens=9), seed=0)
    hooks = [RowHooks(stop=lambda row: core.cancel(other.request_id) and False)]
    request = core.submit([1, 2], SamplingParams(max_tokens=4), seed=0, hooks=hooks)
    own = [RowHooks(stop=lambda row: core.cancel("own"), closing=lambda row: row.sequence.pages)]
    core.submit([1, 2], SamplingParams(max_tokens=4), seed=0, hooks=own, request_id="own")
    ended = run(core)
    assert [r.request_id for r in ended].count("own") == 1 and len(ended) == 3
    assert other.rows[0].finish_reason == "cancelled" and request.rows[0].finish_reason == "length"
    assert_idle(core)


# -- what goes wrong


def test_nan_logits_end_their_request_alone():
    core = toy_core(30, 4, max_batch_tokens=16)
    good = submit_all(core, (5, 9, 13), max_tokens=10)
    bad = [
        core.submit([1, 2, POISON, 3], SamplingParams(max_tokens=10), seed=0),
        core.submit([1] * 20 + [POISON], SamplingParams(max_tokens=10), seed=0),
        core.submit([POISON] + [1] * 40, SamplingParams(n=3, max_tokens=10), seed=0),
        core.submit([1, 2], SamplingParams(max_tokens=10, logit_bias={POISON: 100.0}, **GREEDY), seed=0),
        core.submit([1, 2], SamplingParams(n=2, max_tokens=10, logit_bias={POISON: 4.0}), seed=9),
    ]
    run(core)
    assert_as_alone(good)
    for request in bad:
        assert "NaN" in str(request.error) and {row.finish_reason for row in request.rows} <= {"error", "length"}
    assert tokens_of(bad[3]) == [[POISON]]
    assert_idle(core)


def test_nan_then_reuse_of_the_pages():
    core = toy_core(3, 4)
    bad = core.submit([POISON] * 9, SamplingParams(max_tokens=2), seed=0)
    good = core.submit([1] * 9, SamplingParams(max_tokens=3), seed=0)
    run(core)
    assert bad.error is not None
    assert_as_alone([good])


def test_a_poisoned_prompt_that_is_cancelled_or_preempted_half_way_leaves_no_nan():
    core = toy_core(10, 4, max_batch_tokens=8)
    bad = core.submit([POISON] * 30, SamplingParams(max_tokens=2), seed=0)
    core.step()
    core.cancel(bad.request_id)
    assert_finite(core)
    bad = core.submit([POISON] * 30, SamplingParams(max_tokens=2), seed=0)
    core.step()
    good = core.submit([1] * 30, SamplingParams(max_tokens=6, priority=-1), seed=0)
    run(core)
    assert bad.error is not None
    assert_as_alone([good])


@pytest.mark.parametrize("where", ["processor", "stop", "replace", "closing"])
def test_what_a_request_brings_along_fails_alone(where):
    def fail(*_):
        raise RuntimeError("on purpose")

    core = toy_core(eos=True)
    params, hooks = SamplingParams(max_tokens=5), RowHooks()
    if where == "processor":
        params = SamplingParams(max_tokens=5, logits_processors=[fail])
    else:
        hooks = RowHooks(**{where: fail})
    good = submit_all(core, (3, 4), max_tokens=6)
    bad = core.submit([1, 2], params, seed=0, hooks=[hooks])
    more = submit_all(core, (5,), max_tokens=6)
    run(core)
    assert "on purpose" in str(bad.error) and bad.rows[0].finish_reason in ("error", "length")
    assert_as_alone(good + more, eos=True)
    assert_idle(core)


def test_a_decoder_that_raises_ends_its_request_alone():
    def decode(ids):
        if len(ids) > 2:
            raise RuntimeError("on purpose")
        return "x"

    core = toy_core(decode=decode)
    good = submit_all(core, (3, 4), max_tokens=6)
    bad = core.submit([1, 2], SamplingParams(max_tokens=9, stop="y"), seed=0)
    run(core)
    assert "on purpose" in str(bad.error)
    assert_as_alone(good)
    assert_idle(core)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_raises_can_be_tried_again(error, when):
    core = toy_core(24, 3, max_batch_tokens=10, max_sequences=4)
    requests = submit_all(core, (5, 9, 17, 3), max_tokens=8)
    requests += [core.submit([7, 8], SamplingParams(n=3, max_tokens=8, prompt_logprobs=1), seed=3)]
    rng = random.Random(1)

    def fail(plan):
        if rng.random() < 0.4:
            raise error("on purpose")

    setattr(core.forward, when, fail)
    raised = 0
    while core.has_work:
        known = [tokens_of(request) for request in requests]
        known = [[list(tokens) for tokens in rows] for rows in known]
        try:
            core.step()
        except error:
            raised += 1
            assert [tokens_of(request) for request in requests] == known
        core.check()
    assert raised > 5
    assert_as_alone(requests)
    assert_idle(core)


def test_a_forward_that_stores_nan_and_raises():
    def fail(plan):
        core.forward.after = None
        raise RuntimeError("on purpose")

    core = toy_core(12, 2)
    other = core.submit([1, 2, 3], SamplingParams(max_tokens=3), seed=0)
    bad = core.submit([1] * 9 + [POISON], SamplingParams(max_tokens=3), seed=0)
    core.forward.after = fail
    with pytest.raises(RuntimeError, match="on purpose"):
        core.step()
    assert_finite(core)
    core.cancel(bad.request_id)
    assert_finite(core)
    run(core)
    assert_as_alone([other])


# -- the edges


@pytest.mark.parametrize("num_pages", [1, 2])
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_pool_of_one_and_two_pages(num_pages, page_size):
    slots = num_pages * page_size
    core = toy_core(num_pages, page_size)
    good = [core.submit([1 + i], SamplingParams(max_tokens=slots, n=n), seed=i) for i, n in enumerate((1, 3, 1))]
    good.append(core.submit([1] * slots, SamplingParams(max_tokens=1, n=2), seed=0))
    with pytest.raises(
        ValueError, match=rf"the KV pool \({num_pages} pages of {page_size} tokens\) allows {slots + 1}"
    ):
        core.submit([1], SamplingParams(max_tokens=slots + 1), seed=0)
    with pytest.raises(ValueError, match=f"the prompt has {slots + 1} tokens"):
        core.submit([1] * (slots + 1), SamplingParams(max_tokens=1), seed=0)
    run(core)
    assert_as_alone(good)
    assert_idle(core)


def test_ten_thousand_requests_at_once():
    core = toy_core(1024, 4, 512, 128)
    object.__setattr__(core.settings, "check", False)
    requests = [
        core.submit([i % 20, i % 19], SamplingParams(max_tokens=2, priority=i % 3, **GREEDY), seed=i)
        for i in range(10_000)
    ]
    assert core.cancel(requests[5000].request_id)
    ended = []
    while core.has_work:
        ended += core.step().finished
    assert len(ended) == 10_000 and {len(tokens_of(r)[0]) for r in requests} == {0, 2}
    assert core.stats().steps < 2 * 10_000 / 128 + 10
    assert [r.params.priority for r in ended[1:]] == sorted(r.params.priority for r in ended[1:])
    assert_idle(core)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 30, {"max_tokens": 1}, "the prompt has 30 tokens: max_model_len allows 30"),
        ([1] * 20, {"max_tokens": 11}, "max_tokens=11: max_model_len allows 30"),
        ([1, VOCAB], {}, f"token id {VOCAB} of the prompt is outside the vocabulary: 0 to {VOCAB - 1}"),
        ([-1, 2], {}, "token id -1"),
        ([1.5], {}, "must be a text or a list of token ids"),
        ([None], {}, "must be a text or a list of token ids"),
        (None, {}, "must be a text or a list of token ids"),
        (7, {}, "must be a text or a list of token ids"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"logprobs": VOCAB + 1}, "logprobs"),
        ([1], {"prompt_logprobs": VOCAB + 1}, "prompt_logprobs"),
        ([1], {"stop": "a"}, "stop=.*needs a tokenizer"),
        ([1], {"bad_words": "a"}, "bad_words=.*needs a tokenizer"),
    ],
)
def test_refused_at_the_door(prompt, params, message):
    core = toy_core(max_model_len=30, decode=None, encode=None)
    with pytest.raises(ValueError, match=message):
        core.submit(prompt, SamplingParams(**params), seed=0)
    assert not core.has_work
    assert_idle(core)


def test_processors_that_leave_no_token_end_their_request():
    core = toy_core()
    params = SamplingParams(max_tokens=3, logit_bias=dict.fromkeys(range(VOCAB), -math.inf))
    bad, (good,) = core.submit([1], params, seed=0), submit_all(core, (3,), max_tokens=3)
    run(core)
    assert "no token is allowed" in str(bad.error)
    assert_as_alone([good])


def test_step_without_work():
    core = toy_core()
    result = core.step()
    assert result.tokens == result.finished == [] and core.stats().steps == 0


def test_tokens_of_a_step():
    core = toy_core()
    a, b = submit_all(core, (2, 3), max_tokens=2)
    first, second = core.step(), core.step()
    for at, result in enumerate((first, second)):
        assert {(row.request, token) for row, token in result.tokens} == {(r, tokens_of(r)[0][at]) for r in (a, b)}
    assert not first.finished and set(second.finished) == {a, b}
