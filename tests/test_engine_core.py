"""The loop over a toy model that reads its history from the pages: right tokens mean right page tables."""

import math
import random

import pytest
import torch
from engine_helpers import (
    EOS,
    GREEDY,
    alone,
    assert_as_alone,
    assert_idle,
    by_hand,
    prompts,
    run,
    submit_all,
    submitted,
    tokens_of,
    toy_core,
    toy_decode,
)

from hf_paged.params import SamplingParams
from hf_paged.request import RowHooks
from hf_paged.sampling import Pipeline

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
