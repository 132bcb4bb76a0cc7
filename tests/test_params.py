"""SamplingParams: what is accepted, how it is kept, and that each bad value is refused by name."""

import dataclasses
import math

import pytest

from hf_paged.params import SamplingParams

BAD = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("n", 16385),
    ("best_of", 0),
    ("best_of", "2"),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("temperature", None),
    ("top_k", -2),
    ("top_k", 2.0),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("stop", [""]),
    ("stop", [3]),
    ("stop", 3),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", 7),
    ("ignore_eos", 1),
    ("max_tokens", 0),
    ("max_tokens", 2.0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("seed", 1.0),
    ("seed", "x"),
    ("logprobs", -2),
    ("logprobs", 1.0),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", "all"),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: "x"}),
    ("bad_words", [""]),
    ("bad_words", b"x"),
    ("logits_processors", [3]),
    ("logits_processors", len),
    ("priority", "high"),
    ("priority", math.nan),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x)[:20])
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*must be"):
        SamplingParams(**{name: value})


def test_combinations_are_refused():
    with pytest.raises(ValueError, match="best_of=2"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(ValueError, match="n=2.*temperature=0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match="best_of=2.*temperature=0"):
        SamplingParams(best_of=2, temperature=0)
    with pytest.raises(ValueError, match="min_tokens=5.*max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_unknown_name_is_refused():
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=3)


def test_edges_are_accepted():
    params = SamplingParams(
        n=2,
        best_of=3,
        temperature=5,
        top_k=-1,
        top_p=1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        max_tokens=None,
        min_tokens=1000,
        seed=-(2**70),
        logprobs=-1,
        prompt_logprobs=0,
        logit_bias={3: -math.inf, 4: 1},
        priority=-2,
    )
    assert params.num_samples == 3
    assert params.logit_bias == {3: -math.inf, 4: 1.0}
    assert SamplingParams(logprobs=True).logprobs == 1


def test_given_sequences_are_kept_as_tuples():
    bias = {1: 2.0}
    params = SamplingParams(
        stop="end",
        stop_token_ids=[5, 5, 6],
        bad_words=["a", "b", "a"],
        logits_processors=[max],
        logit_bias=bias,
    )
    bias[2] = 3.0
    assert params.stop == ("end",)
    assert params.stop_token_ids == (5, 6)
    assert params.bad_words == ("a", "b")
    assert params.logits_processors == (max,)
    assert params.logit_bias == {1: 2.0}
    nothing = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, logits_processors=None)
    assert nothing.stop == nothing.stop_token_ids == nothing.bad_words == nothing.logits_processors == ()


def test_is_frozen_and_replaceable():
    params = SamplingParams(temperature=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
    assert not params.greedy
    assert dataclasses.replace(params, temperature=0.0).greedy
    with pytest.raises(ValueError, match="top_p"):
        dataclasses.replace(params, top_p=2.0)


def test_derived_facts():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6, top_k=3).greedy
    assert not SamplingParams(temperature=1e-6, top_k=3).filtered
    assert not SamplingParams().filtered
    assert all(
        SamplingParams(**{name: value}).filtered for name, value in (("top_k", 1), ("top_p", 0.9), ("min_p", 0.1))
    )
    assert SamplingParams(repetition_penalty=1.1).penalised
    assert not SamplingParams(logit_bias={1: 1.0}).plain
    assert SamplingParams(temperature=0).bare
    assert not SamplingParams(temperature=0, logprobs=0).bare


def test_vocabulary_is_checked_by_name():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9], logprobs=10).check_vocabulary(10)
    for name, value in (
        ("logit_bias", {10: 1.0}),
        ("stop_token_ids", [10]),
        ("logprobs", 11),
        ("prompt_logprobs", 11),
    ):
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value}).check_vocabulary(10)
