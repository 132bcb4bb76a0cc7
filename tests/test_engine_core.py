"""The loop over a toy model that reads its history from the pages: right tokens mean right page tables."""

import math
import random

import pytest
import torch
from engine_helpers import (
    EOS,
    GREEDY,
    POISON,
    VOCAB,
    alone,
    assert_finite,
    assert_idle,
    by_hand,
    prompts,
    run,
    tokens_of,
    toy_core,
    toy_decode,
)

from hf_paged.params import SamplingParams
from hf_paged.request import RowHooks
from hf_paged.sampling import Pipeline

LENGTHS = (5, 9, 17, 3, 1, 30, 2, 12)


def submit_all(core, lengths=LENGTHS, **params):
    return [core.submit(p, SamplingParams(**params), seed=i) for i, p in enumerate(prompts(*lengths))]


def assert_as_alone(requests, eos=False):
    for request in requests:
        expected = alone(request.prompt_ids, request.params, request.rows[0].sampling.seed, eos)
        assert tokens_of(request) == tokens_of(expected)
        assert [row.finish_reason for row in request.rows] == [row.finish_reason for row in expected.rows]


# -- tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
@pytest.mark.parametrize("max_sequences", [1, 3, 8])
def test_tokens_do_not_depend_on_the_schedule(temperature, page_size, max_batch_tokens, max_sequences):
    core = toy_core(-(-120 // page_size), page_size, max_batch_tokens, max_sequences)
    requests = submit_all(core, temperature=temperature, max_tokens=9)
    run(core)
    for i, request in enumerate(requests):
        assert tokens_of(request) == [by_hand(request.prompt_ids, request.params, i)]
        assert request.rows[0].finish_reason == "length" and request.ended and request.error is None
    assert_idle(core)


def test_prompts_come_in_chunks_beside_decodes():
    core = toy_core(max_batch_tokens=8)
    first = core.submit(prompts(4)[0], SamplingParams(max_tokens=20), seed=0)
    core.step()
    second = core.submit(prompts(30)[0], SamplingParams(max_tokens=3), seed=1)
    before = len(first.rows[0].output_ids)
    while not second.rows[0].output_ids:
        core.step()
    assert len(first.rows[0].output_ids) - before == math.ceil(30 / 7)
    assert [p.rows.query_lens.tolist() for p in core.forward.plans[1:]][:2] == [[1, 7], [1, 7]]
    run(core)
    assert_as_alone([first, second])


@pytest.mark.parametrize("page_size", [1, 4])
def test_preempted_rows_resume_with_the_same_tokens(page_size):
    core = toy_core(40 // page_size, page_size, max_sequences=6)
    requests = submit_all(core, (5, 9, 7, 3), max_tokens=20)
    run(core)
    assert core.stats().preemptions > 0 and sum(r.metrics.preemptions for r in requests) == core.stats().preemptions
    assert_as_alone(requests)
    assert_idle(core)


def test_the_last_to_come_is_preempted_and_priority_counts():
    core = toy_core(10, 4)
    requests = [
        core.submit(p, SamplingParams(max_tokens=14, priority=priority), seed=i)
        for i, (p, priority) in enumerate(zip(prompts(8, 8, 8), (2.0, 0.0, 1.0), strict=True))
    ]
    ended = run(core)
    assert requests[0].metrics.preemptions > 0 == requests[1].metrics.preemptions
    assert ended.index(requests[1]) < ended.index(requests[0])
    assert_as_alone(requests)


def test_priority_decides_who_is_admitted():
    core = toy_core(max_sequences=1)
    late = core.submit([1], SamplingParams(max_tokens=2), seed=0)
    soon = core.submit([2], SamplingParams(max_tokens=2, priority=-1), seed=0)
    third = core.submit([3], SamplingParams(max_tokens=2), seed=0)
    assert run(core) == [soon, late, third]


# -- several completions


@pytest.mark.parametrize("max_sequences", [1, 2, 8])
@pytest.mark.parametrize("num_pages", [6, 64])
@pytest.mark.parametrize("max_tokens", [1, 9])
def test_n_completions_share_the_prompt(max_sequences, num_pages, max_tokens):
    core = toy_core(num_pages, 4, 16, max_sequences)
    params = SamplingParams(n=5, max_tokens=max_tokens)
    requests = [core.submit(p, params, seed=3) for p in prompts(10, 7)]
    run(core)
    assert_as_alone(requests)
    assert all(len({tuple(t) for t in tokens_of(r)}) > 1 for r in requests)
    if num_pages == 64 and max_sequences == 8:
        assert core.stats().prompt_tokens == 17, "each prompt is computed once"
    assert_idle(core)


def test_rows_of_a_request_and_a_prompt_with_logprobs_in_one_step():
    """Two rows draw from one logit, and one logit is of a prompt that is not complete: as many as rows, but others."""
    core = toy_core(max_batch_tokens=5)
    params = SamplingParams(n=2, max_tokens=1)
    first = core.submit([1, 2, 3, 4], params, seed=1)
    second = core.submit([5, 6, 7], SamplingParams(max_tokens=1, prompt_logprobs=1), seed=1)
    run(core)
    assert_as_alone([first, second])


def test_best_of_returns_the_most_probable():
    params = SamplingParams(n=2, best_of=6, max_tokens=5)
    request = alone([1, 2, 3], params, seed=4)
    every = alone([1, 2, 3], SamplingParams(n=6, max_tokens=5, logprobs=0), seed=4).output(lambda row: "")
    totals = {tuple(o.token_ids): o.cumulative_logprob for o in every.outputs}
    output = request.output(lambda row: "")
    assert [o.index for o in output.outputs] == [0, 1] and all(o.logprobs is None for o in output.outputs)
    chosen = [totals[tuple(o.token_ids)] for o in output.outputs]
    assert chosen == sorted(totals.values(), reverse=True)[:2] == [o.cumulative_logprob for o in output.outputs]


# -- what ends a completion


def test_eos_ends_a_row_and_ignore_eos_does_not():
    bias = {"logit_bias": {EOS: 7.0}, "max_tokens": 40}
    requests = [alone(p, SamplingParams(**bias), eos=True) for p in prompts(3, 4, 5)]
    for request in requests:
        (tokens,) = tokens_of(request)
        assert tokens.index(EOS) == len(tokens) - 1 and request.rows[0].finish_reason == "stop"
        free = alone(request.prompt_ids, SamplingParams(ignore_eos=True, **bias), eos=True)
        assert len(tokens_of(free)[0]) == 40 and tokens_of(free)[0][: len(tokens)] == tokens
        later = alone(request.prompt_ids, SamplingParams(min_tokens=20, **bias), eos=True)
        assert EOS not in tokens_of(later)[0][:20]


def test_stop_tokens():
    plain = by_hand([1, 2], SamplingParams(max_tokens=30))
    stop = plain[4]
    request = alone([1, 2], SamplingParams(max_tokens=30, stop_token_ids=[stop]))
    assert tokens_of(request)[0] == plain[: plain.index(stop) + 1]
    assert (request.rows[0].finish_reason, request.rows[0].stop_reason) == ("stop", stop)
    barred = alone([1, 2], SamplingParams(max_tokens=30, stop_token_ids=[stop], min_tokens=15))
    assert stop not in tokens_of(barred)[0][:15]


@pytest.mark.parametrize("first", [0, 3])
def test_stop_strings_across_tokens(first):
    plain = by_hand([1, 2], SamplingParams(max_tokens=30))
    text = toy_decode(plain)
    stop = text[first : first + 3]
    at = text.index(stop)
    request = alone([1, 2], SamplingParams(max_tokens=30, stop=["?", stop]))
    row = request.rows[0]
    assert row.output_ids == plain[: at + 3] and (row.finish_reason, row.stop_reason) == ("stop", stop)
    assert row.text.text[: row.text_length] == text[:at]
    late = alone([1, 2], SamplingParams(max_tokens=30, stop=[stop], min_tokens=at + 4)).rows[0]
    assert late.output_ids[: at + 4] == plain[: at + 4]


def test_max_tokens_none_fills_the_model():
    core = toy_core(max_model_len=20)
    request = core.submit([1] * 5, SamplingParams(max_tokens=None), seed=0)
    run(core)
    assert len(tokens_of(request)[0]) == 15 and request.rows[0].finish_reason == "length"


def test_a_hook_may_stop_replace_and_look_at_a_closing_row():
    pages = []
    hooks = RowHooks(
        stop=lambda row: "enough" if len(row.output_ids) == 3 else None,
        replace=lambda row, token: (token + 1) % 20,
        closing=lambda row: pages.append((len(row.sequence.pages), row.sequence.computed)),
    )
    request = alone([1, 2, 3], SamplingParams(max_tokens=9, **GREEDY), hooks=[hooks])
    assert request.rows[0].stop_reason == "enough" and len(tokens_of(request)[0]) == 3 and pages == [(1, 5)]
    first = by_hand([1, 2, 3], SamplingParams(max_tokens=1, **GREEDY))[0]
    assert tokens_of(request)[0][0] == (first + 1) % 20


def test_closing_rows_have_pages_even_where_they_take_turns():
    core, seen = toy_core(max_sequences=2), []
    hooks = [RowHooks(closing=lambda row: seen.append(row.sequence.computed))] * 5
    request = core.submit([1, 2, 3], SamplingParams(n=5, max_tokens=1), seed=0, hooks=hooks)
    run(core)
    assert request.error is None and seen == [3] * 5
    assert_idle(core)


# -- what comes with the tokens


def test_logprobs_are_raw_and_processed():
    request = alone([1, 2, 3], SamplingParams(max_tokens=6, temperature=0.5, top_k=3, logprobs=4))
    output = request.output(lambda row: "").outputs[0]
    assert len(output.logprobs) == 6
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entry)) == token and 4 <= len(entry) <= 5
        assert entry[token].raw < 0 and entry[token].processed > -math.inf
        assert sum(math.exp(e.processed) for e in entry.values()) == pytest.approx(1, abs=1e-4)
    chosen = [entry[token].raw for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen))


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 5, 64])
@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs(max_batch_tokens, n):
    prompt = prompts(23)[0]
    params = SamplingParams(n=n, max_tokens=4, prompt_logprobs=2)
    whole = alone(prompt, params).prompt_logprobs
    assert whole[0] is None and len(whole) == 23
    assert all(token in entry and len(entry) in (2, 3) for token, entry in zip(prompt[1:], whole[1:], strict=True))
    core = toy_core(14, 2, max_batch_tokens, 3)
    other = core.submit(prompts(3)[0], SamplingParams(max_tokens=24, priority=-1), seed=0)
    request = core.submit(prompt, params, seed=0)
    run(core)
    assert request.prompt_logprobs == whole and request.rows[0].logprobs == []
    assert_as_alone([request, other])


def test_prompt_logprobs_of_a_prompt_preempted_half_way():
    core = toy_core(12, 2, 3)
    other = core.submit(prompts(3)[0], SamplingParams(max_tokens=16, priority=-1), seed=0)
    core.step()
    request = core.submit(prompts(16)[0], SamplingParams(max_tokens=2, prompt_logprobs=1), seed=0)
    while not request.metrics.preemptions and core.busy:
        core.step()
    assert 1 < len(request.prompt_logprobs) < 16 and not request.rows[0].output_ids
    run(core)
    assert request.prompt_logprobs == alone(*submitted(request)).prompt_logprobs
    assert_as_alone([request, other])


def submitted(request):
    return request.prompt_ids, request.params, request.rows[0].sampling.seed


def test_processors_of_the_request_and_of_a_front_door_both_run():
    def only(*allowed):
        def processor(ids, scores):
            assert ids.shape[0] == 1 and ids[0, :3].tolist() == [1, 2, 3]
            out = torch.full_like(scores, -torch.inf)
            out[:, list(allowed)] = scores[:, list(allowed)]
            return out

        return processor

    params = SamplingParams(max_tokens=8, logits_processors=[only(4, 5, 6)])
    core = toy_core()
    plain = core.submit([1, 2, 3], SamplingParams(max_tokens=8), seed=0)
    own = core.submit([1, 2, 3], params, seed=0)
    hooks = [RowHooks(pipeline=Pipeline(((only(6, 7, 8), False),)))]
    both = core.submit([1, 2, 3], params, seed=0, hooks=hooks)
    run(core)
    assert set(tokens_of(own)[0]) <= {4, 5, 6} and set(tokens_of(both)[0]) == {6}
    assert tokens_of(plain)[0] == by_hand([1, 2, 3], plain.params)


def test_bad_words_are_not_generated():
    plain = by_hand([1, 2], SamplingParams(max_tokens=12, **GREEDY))
    word = toy_decode(plain[3:6])
    (tokens,) = tokens_of(alone([1, 2], SamplingParams(max_tokens=12, bad_words=[word], **GREEDY)))
    assert tokens[:5] == plain[:5] and tokens[5] != plain[5] and word not in toy_decode(tokens)


def test_kept_logits_and_scores():
    hooks = RowHooks(keep_logits=True, keep_scores=True)
    row = alone([1, 2], SamplingParams(max_tokens=3, temperature=0.5), hooks=[hooks]).rows[0]
    assert len(row.logits) == len(row.scores) == 3 and torch.allclose(row.scores[0], row.logits[0] / 0.5)


def test_seeds():
    params = SamplingParams(max_tokens=8)
    core = toy_core()
    requests = [core.submit([1, 2], params, seed=seed) for seed in (0, 1, 0, -1, 2**64 - 1, 2**70)]
    run(core)
    a, b, c, d, e, f = (tokens_of(r)[0] for r in requests)
    assert a == c == f and a != b and d == e != a


def test_request_ids_and_order():
    core = toy_core()
    named = core.submit([1], SamplingParams(), seed=0, request_id="request-1")
    with pytest.raises(ValueError, match="'request-1' is taken"):
        core.submit([1], SamplingParams(), seed=0, request_id="request-1")
    others = [core.submit([1], SamplingParams(), seed=0) for _ in range(3)]
    assert len({r.request_id for r in [named, *others]}) == 4
    run(core)
    assert core.submit([1], SamplingParams(), seed=0, request_id="request-1").request_id == "request-1"


def test_metrics_are_in_order():
    request = alone([1, 2, 3], SamplingParams(max_tokens=3))
    m = request.metrics
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time


def test_stats():
    core = toy_core(20, 4, max_sequences=4)
    submit_all(core, (6, 3), max_tokens=5)
    run(core)
    stats = core.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (9, 10, 5)
    assert (stats.rows, stats.peak_running, stats.preemptions) == (10, 2, 0)
    assert stats.peak_pages == 5 and stats.page_bytes == 32 and stats.kv_bytes_peak == 160
    assert stats.peak_live_bytes == 17 * 8, "ten and seven tokens, less the last one's KV each"
    assert 0 < stats.kv_waste < 0.5 and stats.pages_free == stats.pages_total == 20
    assert 0 < stats.forward_seconds < stats.step_seconds and 0 < stats.overhead < 1
    core.recorder.reset()
    assert core.stats().steps == 0 and core.stats().kv_waste == 0.0


def test_shared_pages_count_once():
    core = toy_core(20, 4)
    core.submit([1] * 8, SamplingParams(n=4, max_tokens=3), seed=0)
    core.step()
    core.step()
    assert core.memory.live_tokens == 8 + 4 and core.stats().peak_live_bytes == 12 * 8


def test_kv_waste_of_ragged_rows_is_small():
    """64 rows of 64 to 512 tokens on pages of 16: at most 4 %."""
    rng = random.Random(0)
    core = toy_core(4096, 16, 8192, 64, 600)
    for i in range(64):
        total = rng.randint(64, 512)
        core.submit([i % 20] * (total - 8), SamplingParams(max_tokens=8), seed=i)
    run(core)
    assert core.stats().peak_running == 64 and core.stats().kv_waste <= 0.04


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
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place", [*PLACES, "sample", "build_plan", "append_drawn", "check_finished", "decode"])
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
                import hf_paged.engine as module

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
    import hf_paged.engine as module

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
