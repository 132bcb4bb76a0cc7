"""Draws by the Triton kernel against torch's, in Triton's interpreter, or on a GPU where there is one."""

import math
import os

import interpreter  # noqa: F401  (before Triton is imported)
import pytest
import torch
from test_filters import SETTINGS, random_scores

from hf_paged import filters
from hf_paged.params import SamplingParams

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that a row has several."""
    from hf_paged.kernels import draw

    monkeypatch.setattr(draw, "BLOCK", 64)


def drawn(scores, given):
    from hf_paged.kernels.draw import DrawOps

    return DrawOps().draw(scores.to(DEVICE), *given.arrays())


def given_for(params, seeds=None, places=None):
    count = len(params)
    return filters.draw_tensors(params, seeds or [7 * i for i in range(count)], places or [100] * count, DEVICE)


# The interpreter is slow: `make test` sees every filter once, with ties or without.
@pytest.mark.parametrize(
    "chosen, kind",
    [
        (SETTINGS[::3], (1.0, False, False)),
        (SETTINGS[1::3], (6.0, True, True)),
        pytest.param(SETTINGS, (1.0, False, False), marks=pytest.mark.slow),
        pytest.param(SETTINGS, (1.0, True, True), marks=pytest.mark.slow),
    ],
    ids=["plain", "ties and holes", "all plain", "all ties and holes"],
)
def test_draws_are_those_of_torch(chosen, kind):
    params = [SamplingParams(**settings) for settings in ({}, *chosen)]
    for seed, vocab in enumerate((1, 90) if not GPU else (1, 90, 3000)):
        scores = random_scores(seed, len(params), vocab, *kind).to(DEVICE)
        given = given_for(params)
        tokens, tops = drawn(scores, given)
        warm = filters.warm(scores, given)
        assert tokens == filters.draw_dense(filters.filtered(warm, given), given).tolist()
        assert tops == warm.amax(1).tolist()


def test_rows_without_a_largest_score_draw_nothing():
    for bad in (math.nan, math.inf):
        scores = random_scores(0, 3, 70, 1.0)
        scores[1, 69] = bad
        tokens, tops = drawn(scores, given_for([SamplingParams(), SamplingParams(top_p=0.9), SamplingParams()]))
        assert tokens[1] == -1 and not math.isfinite(tops[1])
        assert min(tokens[0], tokens[2]) >= 0


def test_seeds_and_places_of_any_size():
    seeds, places = [0, 7, -(2**62), 2**63 + 5], [0, 2**31, 123_456, 3]
    scores = random_scores(1, 4, 130, 0.5).to(DEVICE)
    given = given_for([SamplingParams()] * 4, seeds, places)
    assert drawn(scores, given)[0] == filters.draw_dense(scores, given).tolist()


def test_a_temperature_of_zero_takes_the_largest_and_half_numbers_are_read():
    scores = random_scores(2, 2, 100, 1.0).round().to(DEVICE, torch.bfloat16)
    given = given_for([SamplingParams(temperature=0.0, top_k=3), SamplingParams()])
    assert drawn(scores, given)[0] == [int(scores[0].argmax()), int(filters.draw_dense(scores.float(), given)[1])]
