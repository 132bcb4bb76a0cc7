"""Filters against transformers' warpers, the short way against the plain one, draws against exact probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_paged.filters import draw, draw_dense, draw_tensors, filtered, warm
from hf_paged.params import SamplingParams

CPU = torch.device("cpu")
SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.7},
    {"top_k": 100},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.1, "temperature": 0.9},
    {"top_k": 5, "top_p": 0.99},
    {"top_p": 0.7, "min_p": 0.02},
]


def tensors(params, rows):
    params = [params] * rows if isinstance(params, SamplingParams) else params
    return draw_tensors(params, [7 * i for i in range(rows)], [100 + i for i in range(rows)], CPU)


def ours(scores, params):
    given_params = tensors(params, len(scores))
    return filtered(warm(scores, given_params), given_params)


def theirs(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    for wanted, warper in (
        (temperature != 1.0, lambda: TemperatureLogitsWarper(temperature)),
        (top_k > 0, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1.0, lambda: TopPLogitsWarper(top_p)),
        (min_p > 0.0, lambda: MinPLogitsWarper(min_p)),
    ):
        if wanted:
            scores = warper()(None, scores)
    return scores


def stable_top_p(scores, top_p):
    """transformers' TopPLogitsWarper, with a sort that keeps the order of ties."""
    values, ids = torch.sort(scores, stable=True)
    gone = values.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)
    gone[..., -1:] = False
    return scores.masked_fill(gone.scatter(1, ids, gone), -torch.inf)


def random_scores(seed, rows, vocab, spread, rounded=False, holes=False):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=generator) * spread
    if rounded:
        scores = scores.round()
    if holes and vocab > 2:
        scores[:, ::3] = -torch.inf
    return scores


@pytest.mark.parametrize("given_settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 90, 3000])
def test_filters_equal_transformers(given_settings, vocab):
    for seed, spread in enumerate((0.5, 2.0, 8.0)):
        scores = random_scores(seed, 3, vocab, spread)
        expected = theirs(scores, **given_settings)
        assert torch.equal(ours(scores, SamplingParams(**given_settings)), expected)


@pytest.mark.parametrize("given_settings", SETTINGS, ids=str)
def test_as_many_stay_as_in_transformers_where_scores_tie(given_settings):
    for seed in range(4):
        scores = random_scores(seed, 3, 200, 2.0, rounded=True, holes=seed % 2 == 1)
        mine, expected = ours(scores, SamplingParams(**given_settings)), theirs(scores, **given_settings)
        assert torch.equal(mine.sort().values, expected.sort().values)
        if "top_p" not in given_settings:  # which of equal scores top_p keeps is up to transformers' unstable sort
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("top_p", [0.01, 0.25, 0.5, 0.9, 0.99])
def test_top_p_keeps_higher_ids_of_equal_scores(top_p):
    for seed, vocab in enumerate((2, 10, 64, 400)):
        scores = random_scores(seed, 4, vocab, 1.0, rounded=True)
        scores[0] = 0.0
        assert torch.equal(ours(scores, SamplingParams(top_p=top_p)), stable_top_p(scores, top_p))


def test_top_p_of_equal_scores_cuts_where_transformers_does():
    for vocab in range(2, 24):
        scores = torch.zeros(1, vocab)
        for kept in range(1, vocab):
            mine, expected = (
                ours(scores, SamplingParams(top_p=kept / vocab)),
                theirs(scores, top_p=kept / vocab),
            )
            assert mine.isfinite().sum() == expected.isfinite().sum()


def test_row_without_a_filter_beside_rows_with_one():
    scores = random_scores(1, 4, 300, 2.0, holes=True)
    params = [SamplingParams(**s) for s in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3})]
    together = ours(scores, params)
    assert torch.equal(together[0], scores[0])
    for row in range(4):
        assert torch.equal(together[row : row + 1], ours(scores[row : row + 1], params[row]))


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 63, 64, 70, 299, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.9]),
)


@settings(max_examples=80, deadline=None)
@given(
    params=st.lists(params_strategy, min_size=1, max_size=6),
    vocab=st.sampled_from([1, 3, 64, 65, 300]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    rounded=st.booleans(),
    holes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_short_way_equals_plain_way(params, vocab, spread, rounded, holes, seed):
    """`draw` takes the tokens that noise over the filtered vocabulary takes, also a row at a time."""
    scores = random_scores(seed, len(params), vocab, spread, rounded, holes)
    given_params = tensors(params, len(params))
    scores = warm(scores, given_params)
    short = draw(scores, given_params)
    assert torch.equal(short, draw_dense(filtered(scores, given_params), given_params))
    for row in range(len(params)):
        alone = given_params.pick(torch.tensor([row]))
        assert draw(scores[row : row + 1], alone) == short[row]


@pytest.mark.parametrize(
    "given_settings", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str
)
def test_draws_follow_the_exact_distribution(given_settings):
    """Chi-square of 100,000 draws against softmax of what transformers' warpers leave, at 0.001."""
    count, scores = 100_000, torch.tensor([[0.3, 1.5, -0.7, 2.0, 0.9, -3.0, 1.1, 0.0]])
    probs = theirs(scores, **given_settings).softmax(dim=1)[0].double()
    params = SamplingParams(**given_settings)
    given_params = draw_tensors([params] * count, [42] * count, range(count), CPU)
    many = warm(scores.expand(count, -1), given_params)
    drawn = draw(many, given_params) if params.filtered else draw_dense(many, given_params)
    seen = torch.bincount(drawn, minlength=8).double()
    allowed = probs > 0
    assert seen[~allowed].sum() == 0
    expected = probs[allowed] * count
    chi_square = ((seen[allowed] - expected) ** 2 / expected).sum().item()
    quantiles = {
        2: 10.83,
        3: 13.82,
        4: 16.27,
        5: 18.47,
        6: 20.52,
        7: 22.46,
        8: 24.32,
    }  # 0.999, by tokens allowed
    assert chi_square < quantiles[int(allowed.sum())]
