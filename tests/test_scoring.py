"""Scores of given texts: equal to the model's own, shared, bounded in memory, each failing alone."""

import dataclasses
import math

import pytest
import torch
from conftest import prompts_of, tiny_llama
from engine_helpers import POISON, VOCAB, assert_finite, prompts, run, toy_core, toy_scores

from hf_paged import Engine, SamplingParams
from hf_paged.integrations.scoring import ScoringRun
from hf_paged.integrations.scoring_texts import Pair
from hf_paged.scoring import Scoring, ScoringError

NOTHING = SamplingParams(max_tokens=1)
BAD = 98  # its embedding is not a number in `broken_model`
CONTEXTS = [p[0].tolist() for p in prompts_of(37, 5, 1, 60)]
OPTIONS = [p[0].tolist() for p in prompts_of(1, 1, 4, 7, seed=9)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def own_scores(model, context, continuation):
    """Log-probabilities and greedy flags by one plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].float()
    logits = logits[len(context) - 1 : -1]
    at = torch.tensor(continuation)
    found = logits.log_softmax(-1).gather(1, at[:, None])[:, 0]
    return found.tolist(), (logits.argmax(-1) == at).tolist()


def make(model, **settings):
    return Engine(model, **({"num_pages": 64, "page_size": 4, "check": True} | settings))


def assert_right(model, contexts, options, scores, tolerance=1e-3):
    for context, entry in zip(contexts, scores, strict=True):
        for option, score in zip(options, entry, strict=True):
            assert score.error is None and score.token_ids == option
            logprobs, greedy = own_scores(model, context, option)
            assert score.logprobs == pytest.approx(logprobs, abs=tolerance)
            assert score.greedy == greedy and score.is_greedy == all(greedy)
            assert score.logprob == pytest.approx(sum(logprobs), abs=tolerance)


def assert_idle(engine):
    engine.check()
    stats = engine.stats()
    assert not engine.core.busy and stats.pages_free == stats.pages_total


# -- numbers


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 3}, {"page_size": 1, "num_pages": 200}, {"prefix_caching": False}, {"num_pages": 20}],
    ids=lambda s: next(iter(s), "default"),
)
def test_scores_are_the_models_own(model, settings):
    with make(model, **settings) as engine:
        scores = engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS))
        assert_right(model, CONTEXTS, OPTIONS, scores)
        assert_idle(engine)


def test_hit_and_cold_agree(model):
    with make(model) as engine:
        cold = [engine.score([c], [OPTIONS])[0] for c in CONTEXTS if engine.forget() is None]
        engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS))
        engine.reset_stats()
        hit = engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS))
        assert engine.stats().cached_tokens > 3 * len(CONTEXTS[0])
        for a, b in zip(cold, hit, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4) and x.greedy == y.greedy


def test_greedy_continuation_is_known_as_such(model):
    with make(model) as engine:
        made = engine.generate([CONTEXTS[0]], SamplingParams(temperature=0.0, max_tokens=6))[0].outputs[0].token_ids
        other = [*made[:-1], (made[-1] + 1) % 99]
        greedy, not_greedy = engine.score(CONTEXTS[0], [made, other])
        assert greedy.is_greedy and not not_greedy.is_greedy
        assert not_greedy.greedy == [True] * 5 + [False]


def test_weights_that_change_are_seen(model):
    model = tiny_llama(3)
    with make(model) as engine:
        engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
            model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)
        assert_right(model, CONTEXTS, OPTIONS, engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS)))


# -- what is computed


def test_single_token_options_cost_one_forward(model):
    with make(model) as engine:
        engine.score(CONTEXTS[0], [[token] for token in range(40)])
        stats = engine.stats()
        assert (stats.steps, stats.rows, stats.prompt_tokens) == (1, 1, len(CONTEXTS[0]))


def test_longer_options_share_the_context(model):
    options = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12]]
    with make(model) as engine:
        engine.score(CONTEXTS[0], options)
        # The first computes the context, the others its last token and all but their own last one.
        assert engine.stats().prompt_tokens == len(CONTEXTS[0]) + 2 + (1 + 2) + (1 + 3) + (1 + 1)


def test_a_header_is_computed_once_even_in_flight(model):
    header = CONTEXTS[3]
    questions = [[*header, *p[0].tolist()] for p in prompts_of(5, 6, 7, 8, seed=3)]
    with make(model, max_batch_tokens=16) as engine:
        assert_right(model, questions, [[3], [4]], engine.score(questions, [[[3], [4]]] * 4))
        assert engine.stats().prompt_tokens <= len(header) + 26 + 4 * 4


@pytest.mark.parametrize("most", [1, 2, 7])
def test_rows_of_logits_stay_within_the_bound(most):
    core = toy_core(prefix_caching=True)
    core.settings = dataclasses.replace(core.settings, max_logits=most)
    seen = []
    core.forward.before = lambda plan: seen.append(len(plan.logits_at))
    texts = prompts(40, 33, 21)
    scorings = [Scoring(1, (5, 6)), Scoring(20, (1,)), Scoring(21, (2, 3))]
    requests = [core.submit_scoring(t, s, NOTHING) for t, s in zip(texts, scorings, strict=True)]
    run(core)
    assert max(seen) == most and all(request.error is None for request in requests)
    for text, scoring in zip(texts, scorings, strict=True):
        assert scoring.logprobs == pytest.approx(toy_scores(text, scoring), abs=1e-5)


def test_prompt_logprobs_stay_within_the_bound_too():
    core = toy_core()
    core.settings = dataclasses.replace(core.settings, max_logits=3)
    seen = []
    core.forward.before = lambda plan: seen.append(len(plan.logits_at))
    request = core.submit(prompts(30)[0], SamplingParams(max_tokens=2, prompt_logprobs=0), seed=0)
    run(core)
    assert max(seen) == 3 and len(request.prompt_logprobs) == 30


def test_scoring_beside_generation_changes_nothing():
    core = toy_core(num_pages=24, prefix_caching=True, max_batch_tokens=16)
    alone = toy_core(num_pages=200)
    texts = prompts(20, 9, 30, 12, 25)
    params = SamplingParams(max_tokens=12)
    made = [core.submit(t, params, seed=i) for i, t in enumerate(texts)]
    scorings = [Scoring(max(len(t) // 2, 1), (7, 8)) for t in texts]
    for text, scoring in zip(texts, scorings, strict=True):
        core.submit_scoring(text, scoring, NOTHING)
    expected = [alone.submit(t, params, seed=i) for i, t in enumerate(texts)]
    run(core), run(alone)
    assert [r.rows[0].output_ids for r in made] == [r.rows[0].output_ids for r in expected]
    for text, scoring in zip(texts, scorings, strict=True):
        assert scoring.logprobs == pytest.approx(toy_scores(text, scoring), abs=1e-5)


def test_pages_from_a_second_tier_serve_up_to_the_first_score(model, tmp_path):
    texts = [p[0].tolist() for p in prompts_of(40, 44, 48, seed=4)]
    with make(model, num_pages=16, disk_cache=tmp_path, max_batch_tokens=64) as engine:
        engine.core.second.tiers[0].worth = lambda *_: True  # so small a model computes faster than a disk reads
        first = engine.score(texts, [[[3, 4], [5]]] * 3)
        engine.reset_stats()
        again = engine.score(texts, [[[3, 4], [5]]] * 3)
        assert engine.stats().restored_tokens >= 36
        for text, cold, hit in zip(texts, first, again, strict=True):
            for a, b in zip(cold, hit, strict=True):
                assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
                assert b.logprobs == pytest.approx(own_scores(model, text, b.token_ids)[0], abs=1e-3)


# -- documents


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 5), (16, 1), (200, 50), (1, 1)])
def test_documents_by_windows(model, window, stride):
    documents = [p[0].tolist() for p in prompts_of(50, 3, 17, seed=5)]
    step = stride or window
    with make(model) as engine:
        scores = engine.perplexity(documents, window=window, stride=stride)
        bos = model.config.bos_token_id
        for ids, score in zip(documents, scores, strict=True):
            text, expected, done = [bos, *ids], [], 0
            while done < len(ids):
                end = min(done + (step if done else window), len(ids))
                inputs = text[max(end - window, 0) : end + 1]
                expected += own_scores(model, inputs[: len(inputs) - end + done], ids[done:end])[0]
                done = end
            assert score.token_ids == ids and score.logprobs == pytest.approx(expected, abs=1e-3)
            assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(ids)), rel=1e-3)
        assert_idle(engine)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"window": 0}, "window=0"), ({"window": 999}, "from 1 to 256"), ({"window": 8, "stride": 9}, "stride=9")],
)
def test_bad_windows_are_refused(model, arguments, words):
    with make(model) as engine, pytest.raises(ValueError, match=words):
        engine.perplexity([1, 2, 3], **arguments)


def test_documents_are_kept_for_their_salt(model):
    document = prompts_of(60, seed=6)[0][0].tolist()
    with make(model) as engine:
        plain, salted = (engine.perplexity(document, cache_salt=salt)[0].logprobs for salt in (None, "a"))
        assert salted == pytest.approx(plain, abs=1e-4)
        engine.forget()
        engine.perplexity(document, cache_salt="a")
        found = []
        for salt in (None, "b", "a"):
            before = engine.stats().cached_tokens
            params = SamplingParams(temperature=0.0, max_tokens=1, cache_salt=salt)
            engine.generate([[model.config.bos_token_id, *document]], params)
            found.append(engine.stats().cached_tokens > before)
        assert found == [False, False, True]


# -- shapes


def test_results_have_the_shape_of_the_continuations(model):
    a, b = CONTEXTS[:2]
    with make(model) as engine:
        assert engine.score(a, [3]).token_ids == [3]
        assert [s.token_ids for s in engine.score(a, [[3], [4, 5]])] == [[3], [4, 5]]
        mixed = engine.score([a, b], [[3], [[4], [5, 6]]])
        assert mixed[0].token_ids == [3] and [s.token_ids for s in mixed[1]] == [[4], [5, 6]]
        assert engine.score([a, b], [[], [[4]]])[0] == [] and engine.score([], []) == []
        tensors = engine.score(torch.tensor([a]), [[torch.tensor([3]), torch.tensor([4])]])
        assert [s.token_ids for s in tensors[0]] == [[3], [4]]
        with pytest.raises(ValueError, match="continuations has 1 entries for 2 contexts"):
            engine.score([a, b], [[3]])
        with pytest.raises(ValueError, match="needs a tokenizer"):
            engine.score("text", " more")
        for contexts, options in (
            (None, [3]),
            ([5], None),
            ([5], [[3], None]),
            ([[5], 7], [[3], [4]]),
            ([5], [[3], 4]),
        ):
            with pytest.raises(ValueError, match="give a text, token ids, or a list of either"):
                engine.score(contexts, options)


# -- faults


def test_what_cannot_be_scored_fails_alone(model):
    with make(model, num_pages=10, max_model_len=30) as engine:
        good, empty, outside, long = engine.score([5, 6, 7], [[3], [4, 99], [99], [1] * 29])
        assert good.error is None and math.isfinite(good.logprob)
        for bad in (empty, outside, long):
            assert isinstance(bad.error, ValueError) and math.isnan(bad.logprob) and not bad.is_greedy
        assert "99" in str(outside.error) and "0 to 98" in str(outside.error)
        assert "31 tokens" in str(long.error) and "max_model_len allows 30" in str(long.error)
        (none,) = engine.score([[5, 6]], [[torch.tensor([], dtype=torch.int64)]])[0]
        assert "continuation is empty" in str(none.error)
        with pytest.raises(ValueError, match="max_model_len allows 30"):
            engine.score([5, 6, 7], [[1] * 29], raise_errors=True)
        assert_idle(engine)


def test_long_contexts_are_cut_when_asked(model):
    context = [i % 90 for i in range(50)]
    with make(model, max_model_len=30) as engine:
        cut, too_long = engine.score(context, [[3, 4], [1] * 31], truncate=True)
        assert cut.logprobs == pytest.approx(own_scores(model, context[-29:], [3, 4])[0], abs=1e-3)
        assert "allows 30" in str(too_long.error)
        assert engine.score(context, [[3, 4]])[0].error is not None


def test_an_empty_context_is_the_first_token(model):
    with make(model) as engine:
        bos = model.config.bos_token_id
        score, begins = engine.score([[], []], [[[4, 5]], [[bos, 5]]])
        assert score[0].logprobs == pytest.approx(own_scores(model, [bos], [4, 5])[0], abs=1e-3)
        assert begins[0].token_ids == [5]
        assert begins[0].logprobs == pytest.approx(own_scores(model, [bos], [5])[0], abs=1e-3)


def test_a_row_without_numbers_fails_alone():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = torch.nan
    with make(model) as engine:
        contexts = [CONTEXTS[0], [*CONTEXTS[0][:20], BAD], CONTEXTS[1]]
        first, bad, last = engine.score(contexts, [[[3], [4, 5]]] * 3)
        assert all(isinstance(s.error, ScoringError) for s in bad)
        assert all(s.error is None and math.isfinite(s.logprob) for s in (*first, *last))
        again = engine.score(contexts, [[[3], [4, 5]]] * 3)
        assert [s.logprob for s in again[0]] == pytest.approx([s.logprob for s in first], abs=1e-4)
        assert all(bool(torch.isfinite(t[1:]).all()) for t in engine.store.keys)
        assert_idle(engine)


def test_poisoned_tokens_spoil_nothing_in_the_core():
    core = toy_core(prefix_caching=True)
    text = prompts(20)[0]
    bad = core.submit_scoring([*text[:9], POISON, *text[10:]], Scoring(4, (1,)), NOTHING)
    good = core.submit_scoring(text, scoring := Scoring(12, (1,)), NOTHING)
    run(core)
    assert isinstance(bad.error, ScoringError) and good.error is None
    assert scoring.logprobs == pytest.approx(toy_scores(text, scoring), abs=1e-5)


def test_pages_given_up_for_equal_ones_are_wiped():
    core = toy_core(page_size=1, prefix_caching=True)
    twins = [core.submit_scoring([POISON], Scoring(1, (0,)), NOTHING) for _ in range(2)]
    run(core)  # looks for numbers that are not finite after every step
    assert all(isinstance(request.error, ScoringError) for request in twins)
    assert_finite(core)


def test_stopping_half_way_frees_everything(model):
    pairs = [Pair(context, option) for context in CONTEXTS for option in OPTIONS]
    with make(model, max_batch_tokens=8) as engine:
        scores = iter(ScoringRun(engine, pairs))
        next(scores)
        assert engine.core.busy
        scores.close()
        assert_idle(engine)


def test_cancelled_requests_say_so(model):
    with make(model, max_batch_tokens=8) as engine:
        scores = iter(ScoringRun(engine, [Pair(c, [3]) for c in CONTEXTS]))
        next(scores)
        for request in engine.core.requests:
            engine.cancel(request.request_id)
        rest = [score for _, score in scores]
        assert rest and all("cancelled" in str(score.error) for score in rest)
        assert_idle(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_engine_whole(model, error):
    with make(model, max_batch_tokens=8) as engine:
        forward, calls = engine.core.forward, []

        def fails(plan):
            calls.append(plan)
            if len(calls) == 4:
                raise error("stop")
            return forward(plan)

        engine.core.forward = fails
        with pytest.raises(error):
            engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS))
        assert_idle(engine)
        assert_right(model, CONTEXTS, OPTIONS, engine.score(CONTEXTS, [OPTIONS] * len(CONTEXTS)))


def test_a_step_that_fails_may_be_tried_again():
    core = toy_core(prefix_caching=True, max_batch_tokens=7)
    text = prompts(30)[0]
    request = core.submit_scoring(text, scoring := Scoring(10, (1, 2)), NOTHING)
    core.step(), core.step()
    core.forward.after = lambda plan: (_ for _ in ()).throw(RuntimeError("once"))
    with pytest.raises(RuntimeError):
        core.step()
    core.forward.after = None
    run(core)
    assert request.error is None and scoring.logprobs == pytest.approx(toy_scores(text, scoring), abs=1e-5)


@pytest.mark.parametrize(
    ("start", "ends", "words"),
    [(0, (1,), "start=0"), (9, (1,), "1 to 8"), (8, (), "ends is empty"), (1, (VOCAB,), "outside")],
)
def test_the_core_refuses_what_it_cannot_score(start, ends, words):
    core = toy_core()
    with pytest.raises(ValueError, match=words):
        core.submit_scoring(prompts(8)[0], Scoring(start, ends), NOTHING)
    assert not core.busy
