"""The generate contract, "Arguments": processors, what ends a row, streamers."""

import threading

import pytest
import torch
from conftest import PAD, assert_clean, assert_equal, both, fresh, left_padded, prompts_of, same_error, tiny_llama
from torch.testing import assert_close
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

pytestmark = pytest.mark.usefixtures("paged")


@pytest.fixture
def wide():
    """A model with an end-of-sequence token that is likely, so that what moves it shows."""
    made = tiny_llama(vocab_size=16)
    made.generation_config.eos_token_id = 5
    return made


# -- processors

PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_penalty below one": {"repetition_penalty": 0.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[3], [7, 2], [4, 2, 7]]},
    "sequence_bias": {"sequence_bias": [[[4], 2.5], [[7, 8], -10.0], [[11, 3], 4.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "max_length": 13},
    "suppress_tokens": {"suppress_tokens": [3, 4, 8, 10]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [2, 3, 4, 6, 8, 10, 12, 14]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "renormalize_logits": {"renormalize_logits": True},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "min_length": {"min_length": 16},
    "min_new_tokens": {"min_new_tokens": 10},
}
PROCESSORS["many"] = {
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[3]],
    "suppress_tokens": [4],
    "min_new_tokens": 4,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(wide, ways, name):
    ids = torch.cat(prompts_of(6, 6, 6, vocab_size=16))
    settings = {"max_length": 18} | PROCESSORS[name]
    result = assert_equal(wide, input_ids=ids, **settings)
    assert_equal(wide, input_ids=torch.tensor([[3]]), **settings)
    assert ways.taken() == "engine"
    if name not in ("renormalize_logits", "forced_bos_token_id", "encoder_repetition_penalty"):
        assert result.tolist() != wide.generate(ids, max_length=settings["max_length"]).tolist()  # it shows
    plain, paged = both(wide, input_ids=ids, return_dict_in_generate=True, output_scores=True, **settings)
    for ours, theirs in zip(paged.scores, plain.scores, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_with_left_pads(wide, name):
    """Lengths count from the padded prompt, as in `generate`; what looks at tokens sees each row's own."""
    prompts = prompts_of(9, 4, 6, vocab_size=16)
    batch, settings = left_padded(prompts), {"max_length": 19} | PROCESSORS[name]
    result = wide.generate(**batch, cache_implementation="paged", **settings)
    if name in ("min_length", "forced_bos_token_id", "forced_eos_token_id"):
        assert result.tolist() == wide.generate(**batch, **settings).tolist()
        return
    for row, prompt in zip(result, prompts, strict=True):
        length = settings["max_length"] - 9 + prompt.shape[1]
        alone = wide.generate(prompt, **{**settings, "max_length": length})[0].tolist()
        mine = row[9 - prompt.shape[1] :].tolist()
        assert mine[: len(alone)] == alone and set(mine[len(alone) :]) <= {PAD}


def test_remove_invalid_values(model, rows, ways):
    def spoil(module, args, output):
        output[..., 3] = float("nan")
        return output

    model.lm_head.register_forward_hook(spoil)
    assert_equal(model, **rows, max_new_tokens=4, remove_invalid_values=True)
    assert ways.taken() == "loop"
    with pytest.raises(RuntimeError, match="NaN"):
        model.generate(**rows, max_new_tokens=4, cache_implementation="paged")
    assert_clean(model)


class Recorder(LogitsProcessor):
    """Adds to the score of the token after the row's last one, and notes what it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen += [(row.tolist(), tuple(scores.shape)) for row in input_ids]
        scores = scores.clone()
        for i, row in enumerate(input_ids):
            scores[i, (int(row[-1]) + 1) % scores.shape[1]] += 50.0 if row.shape[0] % 2 else 0.0
        return scores


def test_users_processor(model, rows):
    assert_equal(model, **rows, max_new_tokens=8, logits_processor=fresh(lambda: [Recorder()]))
    assert_equal(model, **rows, max_new_tokens=8, logits_processor=[lambda ids, scores: -scores])


def test_users_processor_sees_a_rows_own_ids(model):
    prompts = prompts_of(9, 4, 13)
    recorder = Recorder()
    result = model.generate(
        **left_padded(prompts), max_new_tokens=6, logits_processor=[recorder], cache_implementation="paged"
    )
    assert len(recorder.seen) == 3 * 6
    for row, prompt in zip(result.tolist(), prompts, strict=True):
        own = row[13 - prompt.shape[1] :]
        seen = [ids for ids, _ in recorder.seen if ids[: prompt.shape[1]] == prompt[0].tolist()]
        assert seen == [own[:n] for n in range(prompt.shape[1], len(own))]
        assert own == model.generate(prompt, max_new_tokens=6, logits_processor=[Recorder()])[0].tolist()
    assert {shape for _, shape in recorder.seen} == {(1, 99)}


def test_prefix_allowed_tokens_fn(model, rows, batch):
    calls = []

    def allowed(index, ids):
        calls.append((index, ids.dim()))
        return [(int(ids[-1]) * 7 + index + k) % 97 + 2 for k in range(3)]

    assert_equal(model, **rows, max_new_tokens=8, prefix_allowed_tokens_fn=allowed)
    assert set(calls) == {(0, 1), (1, 1), (2, 1)}
    assert_equal(model, **batch, max_new_tokens=8, prefix_allowed_tokens_fn=allowed)
    assert_equal(
        model,
        **rows,
        max_new_tokens=4,
        prefix_allowed_tokens_fn=allowed,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
    )


# -- what ends a row


def test_several_ends(model, rows):
    new = model.generate(**rows, max_new_tokens=12)[:, 6:]
    ends = [int(new[0, 2]), int(new[1, 7])]
    for given in (ends, ends[0], torch.tensor(ends), [*ends, 98]):
        assert_equal(model, **rows, max_new_tokens=12, eos_token_id=given)


def test_ends_that_are_no_tokens(model, rows):
    """Ids outside the vocabulary end nothing; some people switch the end off so."""
    assert_equal(model, **rows, max_new_tokens=5, eos_token_id=-1)
    assert_equal(model, **rows, max_new_tokens=5, eos_token_id=[3, 5000])


def test_stop_strings(text_model, tokenizer, ways):
    texts = ["def main(a, b):", "import os, sys", "x"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    new = text_model.generate(**batch, max_new_tokens=10)[:, batch["input_ids"].shape[1] :]
    strings = [tokenizer.decode(new[0, 3:5])[1:], tokenizer.decode(new[1, 6])]
    arguments = dict(max_new_tokens=10, tokenizer=tokenizer)
    result = assert_equal(text_model, **batch, stop_strings=strings, eos_token_id=4095, **arguments)
    assert (result[0, -1], result[1, -1]) == (1, 1)
    assert_equal(text_model, **batch, stop_strings=strings, **arguments)
    assert_equal(text_model, **batch, stop_strings=strings[0], **arguments)
    same_error(text_model, **batch, stop_strings=strings)
    config = text_model.generation_config
    config.stop_strings = strings
    assert_equal(text_model, **batch, **arguments)
    assert config.stop_strings == strings and ways.taken() == "engine"
    # A model's own config comes in with a config that is given.
    assert_equal(text_model, **batch, generation_config=type(config)(max_new_tokens=10), tokenizer=tokenizer)


def test_max_time(model, rows, batch):
    result = assert_equal(model, **rows, max_new_tokens=8, max_time=0.0)
    assert result.shape == (3, 7)
    assert_equal(model, **batch, max_new_tokens=8, max_time=0.0, eos_token_id=98)
    assert_equal(model, **rows, max_new_tokens=8, max_time=1000.0)


class EndsOn(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


def test_users_stopping_criteria(model, batch):
    new = model.generate(**batch, max_new_tokens=10)[:, 13:]
    ends = EndsOn([int(new[0, 3]), int(new[1, 6])])
    for eos in (None, 98, int(new[2, 4])):
        assert_equal(model, **batch, max_new_tokens=10, stopping_criteria=[ends], eos_token_id=eos)
    everything = EndsOn([int(new[0, 3]), int(new[1, 6]), int(new[2, 1])])
    result = assert_equal(model, **batch, max_new_tokens=10, stopping_criteria=[everything])
    assert result.shape[1] < 23


def test_stopping_criteria_see_lengths_as_in_generate(model, batch):
    for stop in (lambda ids, scores: ids.shape[1] >= 18, lambda ids, scores: ids[:, 13:].sum(-1) > 120):
        for eos in (None, 98):
            assert_equal(model, **batch, max_new_tokens=10, stopping_criteria=[stop], eos_token_id=eos)


def test_stopping_criteria_get_scores(model, batch):
    def confident(ids, scores):
        return torch.stack([s.softmax(-1).amax(-1) for s in scores]).amax(0) > 0.9

    asked = dict(return_dict_in_generate=True, output_scores=True, eos_token_id=98)
    plain, paged = both(model, **batch, max_new_tokens=10, stopping_criteria=[confident], **asked)
    assert paged.sequences.tolist() == plain.sequences.tolist()
    with pytest.raises(TypeError):
        model.generate(**batch, stopping_criteria=[confident], cache_implementation="paged")
    assert_clean(model)


# -- streaming


class Listener:
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append((tuple(value.shape), value.tolist()))

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("size", [1, 3])
def test_streamer(model, size):
    batch = left_padded(prompts_of(9, 4, 7)[:size])
    new = model.generate(**batch, max_new_tokens=8)[:, 9:]
    first, last = int(new[0, 3]), int(new[-1, 5])
    for extra in ({}, {"eos_token_id": [first, last]}, {"stopping_criteria": [EndsOn([first])]}):
        for shown in ({}, {"return_dict_in_generate": True, "output_scores": True}):
            heard = []
            for more in ({}, {"cache_implementation": "paged"}):
                listener = Listener()
                model.generate(**batch, max_new_tokens=8, streamer=listener, **extra, **shown, **more)
                heard.append(listener.heard)
            assert heard[1] == heard[0]


def test_streamer_of_the_loop(model, ways):
    heard = []
    for more in ({}, {"cache_implementation": "paged"}):
        listener = Listener()
        ids = torch.tensor([[5, 6, 7]])
        model.generate(ids, attention_mask=torch.tensor([[1, 0, 1]]), max_new_tokens=5, streamer=listener, **more)
        heard.append(listener.heard)
    assert heard[1] == heard[0] and ways.taken() == "loop"


def test_text_streamers(text_model, tokenizer, capsys):
    inputs = tokenizer("def main(a, b):", return_tensors="pt", return_token_type_ids=False)
    printed = []
    for more in ({}, {"cache_implementation": "paged"}):
        text_model.generate(**inputs, max_new_tokens=12, streamer=TextStreamer(tokenizer), **more)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = dict(inputs, max_new_tokens=12, streamer=streamer, cache_implementation="paged")
    thread = threading.Thread(target=text_model.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    out = text_model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(out)
    same_error(text_model, input_ids=torch.tensor([[5], [6]]), streamer=TextStreamer(tokenizer), max_new_tokens=2)
