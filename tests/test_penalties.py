"""Bias, bans and penalties against transformers' processors and OpenAI's formulas, and what pipelines do."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)

from hf_paged.params import SamplingParams
from hf_paged.penalties import adjust
from hf_paged.pipeline import Pipeline, run_pipelines
from hf_paged.sampling import SamplingRow

VOCAB = 50


def row(prompt=(1, 2, 3), output=(), pipeline=None, eos=(), bad=(), **settings):
    params = SamplingParams(max_tokens=None, temperature=0, **settings)
    return SamplingRow(params, 0, len(prompt) + len(output), list(prompt), list(output), pipeline, eos, bad)


def logits(rows=1, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def adjusted(scores, *rows):
    before = scores.clone()
    after = adjust(scores, rows, owned=False)
    assert torch.equal(scores, before)
    return after


def test_nothing_to_do_copies_nothing():
    scores = logits(2)
    assert adjust(scores, [row(), row(min_tokens=1, output=[5])], owned=False) is scores


def test_owned_scores_are_written_to():
    scores = logits()
    assert adjust(scores, [row(logit_bias={3: 1.0})], owned=True) is scores


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    rows = [
        row([1, 2, 2, 40], [7, 7, 1], repetition_penalty=penalty),
        row([9], [], repetition_penalty=penalty),
        row(),
    ]
    scores = logits(3)
    after = adjusted(scores, *rows)
    for i in (0, 1):
        ids = torch.tensor([rows[i].prompt_ids + rows[i].output_ids])
        assert torch.equal(after[i : i + 1], RepetitionPenaltyLogitsProcessor(penalty)(ids, scores[i : i + 1]))
    assert torch.equal(after[2], scores[2])


def test_frequency_and_presence_count_the_output_only():
    scores = logits(4)
    rows = [
        row([5], [7, 7, 8, 7], frequency_penalty=0.5),
        row([5], [7, 7, 8], presence_penalty=-1.5),
        row([5], [], presence_penalty=1.0),
        row([7], [0, 49, 49], frequency_penalty=0.25, presence_penalty=1.0),
    ]
    expected = scores.clone()
    for i, item in enumerate(rows):
        for token in set(item.output_ids):
            expected[i, token] -= item.params.frequency_penalty * item.output_ids.count(token)
            expected[i, token] -= item.params.presence_penalty
    assert torch.equal(adjusted(scores, *rows), expected)


def test_bias_is_added_and_can_forbid():
    after = adjusted(logits(2), row(logit_bias={0: 2.5, 49: -torch.inf}), row())
    expected = logits(2)
    expected[0, 0] += 2.5
    expected[0, 49] = -torch.inf
    assert torch.equal(after, expected)


def test_min_tokens_masks_ends_as_transformers():
    scores = logits(3)
    settings = {"min_tokens": 2, "stop_token_ids": [9], "ignore_eos": True}
    rows = [row([1], output, eos=(4, 5), **settings) for output in ([], [6], [6, 7])]
    after = adjusted(scores, *rows)
    processor = MinNewTokensLengthLogitsProcessor(1, 2, [4, 5, 9])
    for i, item in enumerate(rows):
        ids = torch.tensor([item.prompt_ids + item.output_ids])
        assert torch.equal(after[i : i + 1], processor(ids, scores[i : i + 1]))


@pytest.mark.parametrize(
    ("prompt", "output"),
    [([1], []), ([1, 2], []), ([1], [2]), ([1, 2], [3]), ([1, 2, 3], []), ([9, 1], [2, 3]), ([3], [1])],
)
def test_bad_words_equal_transformers(prompt, output):
    bad = ((7,), (4,), (2, 8), (2, 3, 9), (1, 2, 3, 10), (3, 11), (1, 1))
    scores = logits()
    # A token before all others: transformers up to 5.17 does not ban a word begun by the first token of a text.
    ids = torch.tensor([[49, *prompt, *output]])
    expected = NoBadWordsLogitsProcessor([list(word) for word in bad], eos_token_id=[4])(ids, scores)
    assert torch.equal(adjusted(scores, row(prompt, output, eos=(4,), bad=bad)), expected)


def test_ids_outside_the_vocabulary_are_passed_over():
    strange = row([1, 99, -1], [60, 2], eos=(99, -1), bad=((77,), (2, 88)), min_tokens=9, repetition_penalty=2.0)
    known = row([1], [2], repetition_penalty=2.0)
    assert torch.equal(adjusted(logits(), strange), adjusted(logits(), known))
    strange = row([1], [60, 2], frequency_penalty=1.0, logit_bias={1000: 5.0})
    assert torch.equal(adjusted(logits(), strange), adjusted(logits(), row([1], [2], frequency_penalty=1.0)))


def test_a_row_is_adjusted_alike_alone_and_in_a_batch():
    rows = [
        row([1, 2], [3, 3], repetition_penalty=1.2, frequency_penalty=0.3, logit_bias={3: 1.0}),
        row([4] * 30, list(range(20)), presence_penalty=0.7, bad=((19, 5),)),
        row([5], [5], repetition_penalty=0.8, min_tokens=3, eos=(1,)),
    ]
    together = adjusted(logits(3), *rows)
    for i in range(3):
        assert torch.equal(adjusted(logits(3)[i : i + 1], rows[i])[0], together[i])


def test_pipeline_runs_in_order_with_each_rows_own_ids():
    seen = []

    def own_ids(ids, scores):
        seen.append(ids.tolist())
        assert ids.dtype == torch.int64 and scores.shape == (1, VOCAB)
        scores[:, ids[0, -1]] = -torch.inf  # in place
        return scores

    shared = Pipeline(
        ((SuppressTokensLogitsProcessor([6]), True), (own_ids, False), (TemperatureLogitsWarper(0.5), True))
    )
    rows = [row([1, 2], [3], shared), row([4], pipeline=None), row([5, 9], pipeline=shared)]
    scores = logits(3)
    errors = [None] * 3
    after = run_pipelines(scores, rows, errors)
    assert seen == [[[1, 2, 3]], [[5, 9]]]
    assert errors == [None] * 3
    assert torch.equal(scores, logits(3))
    expected = logits(3)
    for i, last in ((0, 3), (2, 9)):
        expected[i, [6, last]] = -torch.inf
        expected[i] /= 0.5
    assert torch.equal(after, expected)


def test_pipeline_result_may_be_of_another_dtype():
    pipeline = Pipeline(((lambda ids, scores: scores.double() * 2, False), (lambda ids, scores: scores.half(), True)))
    after = run_pipelines(logits(), [row(pipeline=pipeline)], [None])
    assert after.dtype == torch.float32
    assert torch.equal(after, (logits() * 2).half().float())


def test_no_pipeline_copies_nothing():
    scores = logits(2)
    assert run_pipelines(scores, [row(), row(pipeline=Pipeline(()))], [None, None]) is scores
