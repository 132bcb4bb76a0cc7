"""sample(): greedy and drawn tokens, faults kept to their row, log-probabilities, and the same alone as in a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.params import SamplingParams
from hf_paged.sampling import Pipeline, SamplingError, SamplingRow, prompt_logprobs, sample

VOCAB = 60


def row(seed=1, position=9, prompt=(1, 2, 3), output=(4, 4), pipeline=None, **settings):
    extras = {name: settings.pop(name) for name in ("keep_logits", "keep_scores", "eos_ids") if name in settings}
    params = SamplingParams(**{"max_tokens": None, **settings})
    return SamplingRow(params, seed, position, list(prompt), list(output), pipeline, **extras)


def greedy(**settings):
    return row(temperature=0, **settings)


def logits(rows=1, seed=0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def each(function):
    return Pipeline(((function, False),))


def together(function):
    return Pipeline(((function, True),))


def test_greedy_takes_the_largest_and_the_first_of_equals():
    scores = logits(3)
    scores[2, [7, 30]] = 50.0
    result = sample(scores, [greedy(), greedy(), greedy()])
    assert result.tokens == [*scores[:2].argmax(1).tolist(), 7]
    assert result.errors == [None] * 3
    assert result.logprobs is result.logits is result.scores is None


def test_greedy_is_the_same_the_long_way():
    scores = logits(4)
    mixed = [greedy(), row(), greedy(logprobs=0), greedy(pipeline=each(lambda ids, scores: scores))]
    tokens = sample(scores, mixed).tokens
    fast = sample(scores, [greedy()] * 4).tokens
    assert [tokens[i] for i in (0, 2, 3)] == [fast[i] for i in (0, 2, 3)]


def test_no_rows():
    assert sample(torch.empty(0, VOCAB), []).tokens == []


@pytest.mark.parametrize("shape", [(2, VOCAB), (VOCAB,), (1, 0), (1, 1, VOCAB)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="logits has shape"):
        sample(torch.zeros(shape), [row()])


def test_half_precision_logits():
    scores = logits(2).bfloat16()
    rows = [greedy(), row(top_p=0.9)]
    assert sample(scores, rows).tokens == sample(scores.float(), rows).tokens


def test_a_token_depends_on_seed_and_position():
    scores = logits(1).expand(200, -1)
    by_seed = sample(scores, [row(seed=seed) for seed in range(200)]).tokens
    by_position = sample(scores, [row(position=at) for at in range(200)]).tokens
    assert len(set(by_seed)) > 5 and len(set(by_position)) > 5
    assert by_seed == sample(scores, [row(seed=seed + 2**64) for seed in range(200)]).tokens
    assert len(set(sample(scores, [row(prompt=[i]) for i in range(200)]).tokens)) == 1


def test_sample_follows_the_exact_distribution():
    count, scores = 20_000, torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5]])
    rows = [row(position=at, temperature=1.5, top_k=4, logit_bias={0: 1.0}) for at in range(count)]
    seen = torch.bincount(torch.tensor(sample(scores.expand(count, -1), rows).tokens), minlength=5)
    probs = (torch.tensor([2.0, 0.0, 2.0, -torch.inf, 0.5]) / 1.5).softmax(0)
    kept = probs > 0
    assert seen[3] == 0
    expected = probs[kept] * count
    assert ((seen[kept] - expected) ** 2 / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, 0.001


row_strategy = st.builds(
    row,
    seed=st.integers(-(2**65), 2**65),
    position=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    pipeline=st.sampled_from(
        [
            None,
            None,
            each(lambda ids, scores: scores * 0.9),
            together(lambda ids, scores: scores.clamp(-3, 3)),
        ]
    ),
    temperature=st.sampled_from([0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 5, 30]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.sampled_from([None, {3: 2.0, 5: -1.0}]),
    logprobs=st.sampled_from([None, 0, 3]),
    keep_scores=st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=7), seed=st.integers(0, 99), rounded=st.booleans())
def test_a_row_is_the_same_alone_and_in_any_batch(rows, seed, rounded):
    scores = logits(len(rows), seed)
    scores = scores.round() if rounded else scores
    before = scores.clone()
    batch = sample(scores, rows)
    assert torch.equal(scores, before)
    backwards = sample(scores.flip(0), rows[::-1])
    assert backwards.tokens[::-1] == batch.tokens
    for i, item in enumerate(rows):
        alone = sample(scores[i : i + 1], [item])
        assert alone.tokens[0] == batch.tokens[i] and alone.errors[0] is batch.errors[i] is None
        if item.params.logprobs is not None:
            assert alone.logprobs[0] == batch.logprobs[i]
        if item.keep_scores:
            assert torch.equal(alone.scores[0], batch.scores[i])
        bare = SamplingRow(item.params, item.seed, item.position, item.prompt_ids, item.output_ids, item.pipeline)
        assert sample(scores[i : i + 1], [bare]).tokens == alone.tokens


def bad_rows():
    nothing_left = {token: -torch.inf for token in range(VOCAB)}

    def boom(ids, scores):
        raise KeyError("boom")

    return {
        "NaN": row(pipeline=each(lambda ids, scores: scores * torch.nan)),
        r"\+inf": row(pipeline=each(lambda ids, scores: scores + torch.inf)),
        "no token is allowed": row(logit_bias=nothing_left),
        "are all -inf": greedy(logit_bias=nothing_left),
        "boom": row(pipeline=each(boom)),
        r"narrow returned scores of shape \[1, 3\]": row(pipeline=each(named("narrow", lambda i, s: s[:, :3]))),
        "silent returned NoneType": row(pipeline=each(named("silent", lambda i, s: None))),
    }


def named(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize("message", list(bad_rows()))
@pytest.mark.parametrize("neighbour", [greedy(), row(), row(top_p=0.8, logprobs=2)], ids=["greedy", "drawn", "top_p"])
def test_a_bad_row_is_its_own_error(message, neighbour):
    scores = logits(3)
    result = sample(scores, [neighbour, bad_rows()[message], neighbour])
    assert result.tokens[1] == -1
    with pytest.raises(Exception, match=message):
        raise result.errors[1]
    for i in (0, 2):
        assert result.errors[i] is None
        assert result.tokens[i] == sample(scores[i : i + 1], [neighbour]).tokens[0]
    assert not result.logprobs or result.logprobs[1] is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("make", [greedy, row])
def test_bad_logits_are_their_rows_error(value, make):
    scores = logits(3)
    scores[1, 5] = value
    calls = []
    pipeline = each(lambda ids, scores: calls.append(1) or scores)
    for rows in ([make()] * 3, [make(keep_logits=True, keep_scores=True, logprobs=1, pipeline=pipeline)] * 3):
        result = sample(scores, rows)
        assert isinstance(result.errors[1], SamplingError) and "the model's logits" in str(result.errors[1])
        assert result.tokens[1] == -1 and min(result.tokens[0], result.tokens[2]) >= 0
    assert result.logits[1] is result.scores[1] is result.logprobs[1] is None
    assert len(calls) == 2


def test_logits_all_minus_infinity():
    scores = logits(2)
    scores[0] = -torch.inf
    for rows in ([greedy(), greedy()], [row(top_k=3), row()]):
        result = sample(scores, rows)
        assert "no token is allowed" in str(result.errors[0]) and result.errors[1] is None


def test_greedy_row_may_be_forced_by_plus_infinity():
    def force(ids, scores):
        scores[:, 11] = torch.inf
        return scores

    assert sample(logits(), [greedy(pipeline=each(force))]).tokens == [11]


@pytest.mark.parametrize("wrong", [lambda i, s: s[:1, :3], lambda i, s: [][0], lambda i, s: None])
def test_batched_processor_that_fails_fails_its_group_alone(wrong):
    broken = Pipeline(((lambda i, s: s + 1, True), (wrong, True), (lambda i, s: s, False)))
    fine = together(lambda i, s: s * 0.5)
    result = sample(logits(5), [row(pipeline=p) for p in (broken, fine, broken, None, broken)])
    assert [error is None for error in result.errors] == [False, True, False, True, False]
    assert result.errors[0] is result.errors[4]


def test_processor_that_fails_for_one_row_leaves_later_steps_to_the_others():
    def picky(ids, scores):
        if ids[0, 0] == 13:
            raise ValueError("unlucky")
        return scores

    pipeline = Pipeline(((picky, False), (lambda i, s: s.neg(), True)))
    result = sample(logits(3), [greedy(prompt=[at], pipeline=pipeline) for at in (12, 13, 14)])
    assert result.tokens == [int(logits(3)[0].argmin()), -1, int(logits(3)[2].argmin())]
    assert "unlucky" in str(result.errors[1]) and "picky" in result.errors[1].__notes__[0]


def test_keyboard_interrupt_passes():
    def interrupt(ids, scores):
        raise KeyboardInterrupt

    for pipeline in (each(interrupt), together(interrupt)):
        with pytest.raises(KeyboardInterrupt):
            sample(logits(2), [row(), row(pipeline=pipeline)])


def test_logits_and_scores_are_kept_on_request():
    scores = logits(3)
    double = each(lambda ids, scores: scores.mul_(2))
    rows = [row(keep_logits=True, pipeline=double), row(keep_scores=True, top_k=2, pipeline=double), greedy()]
    result = sample(scores, rows)
    assert torch.equal(result.logits[0], scores[0]) and result.logits[1] is result.logits[2] is None
    expected = torch.full((VOCAB,), -torch.inf)
    top = scores[1].topk(2).indices
    expected[top] = scores[1, top] * 2
    assert torch.equal(result.scores[1], expected) and result.scores[0] is result.scores[2] is None
    result.logits[0].zero_()
    assert torch.equal(scores, logits(3))


@pytest.mark.parametrize("k", [0, 3, VOCAB + 5, -1])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.5, "top_k": 4}], ids=["greedy", "drawn"])
def test_logprobs(k, settings):
    scores = logits(2)
    result = sample(scores, [row(logprobs=k, keep_scores=True, logit_bias={5: 1.0}, **settings), row()])
    found = result.logprobs[0]
    assert result.logprobs[1] is None
    raw, processed = scores[0].log_softmax(0), result.scores[0].log_softmax(0)
    order = raw.argsort(descending=True).tolist()
    wanted = VOCAB if k < 0 else min(k, VOCAB)
    assert next(iter(found)) == result.tokens[0]
    assert set(found) == {result.tokens[0], *order[:wanted]}
    assert [token for token in found if token != result.tokens[0]] == [
        token for token in order[:wanted] if token != result.tokens[0]
    ]
    for token, entry in found.items():
        assert entry.token_id == token and entry.rank == order.index(token) + 1
        assert entry.raw == pytest.approx(raw[token].item())
        assert entry.processed == pytest.approx(processed[token].item())


def test_equal_logits_share_a_rank():
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    found = sample(scores, [greedy(logprobs=4)]).logprobs[0]
    assert {token: entry.rank for token, entry in found.items()} == {1: 1, 2: 1, 0: 3, 3: 4}


def test_prompt_logprobs():
    scores, next_ids = logits(4), torch.tensor([3, 0, 59, 7])
    found = prompt_logprobs(scores, next_ids, 2)
    raw = scores.log_softmax(1)
    for i, entries in enumerate(found):
        token = int(next_ids[i])
        assert next(iter(entries)) == token
        assert set(entries) == {token, *raw[i].topk(2).indices.tolist()}
        assert entries[token].raw == entries[token].processed == pytest.approx(raw[i, token].item())
        assert entries[token].rank == int((raw[i] > raw[i, token]).sum()) + 1
    assert prompt_logprobs(torch.empty(0, VOCAB), torch.empty(0, dtype=torch.int64), 2) == []
    with pytest.raises(ValueError, match="next_ids"):
        prompt_logprobs(scores, next_ids[:3], 2)
