"""The generate contract, "Arguments": each line against `generate` without the argument."""

import threading

import pytest
import torch
from conftest import (
    PAD,
    assert_clean,
    assert_equal,
    both,
    engine_of,
    fresh,
    left_padded,
    prompts_of,
    spread,
    tiny_llama,
)
from torch.testing import assert_close
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    set_seed,
)

import hf_paged

pytestmark = pytest.mark.usefixtures("paged")

VOCAB = 12  # small enough to count what is drawn


@pytest.fixture
def rows():
    """Three prompts of one length."""
    return {"input_ids": torch.cat(prompts_of(6, 6, 6))}


@pytest.fixture
def batch():
    return left_padded(prompts_of(9, 4, 13))


@pytest.fixture
def wide():
    """A model with an end-of-sequence token that is likely, so that what moves it shows."""
    made = tiny_llama(vocab_size=16)
    made.generation_config.eos_token_id = 5
    return made


def same_error(model, kind=ValueError, **arguments):
    """Both ways refuse the call in the same words; returns them."""
    messages = []
    for extra in ({}, {"cache_implementation": "paged"}):
        with pytest.raises(kind) as error:
            model.generate(**arguments, **extra)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    return messages[0]


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


# -- chance


def p_value(counts, expected):
    """Of Pearson's chi-square test; cells with fewer than five expected are taken together."""
    small = expected < 5
    rest = [torch.stack([v[small].sum()]) for v in (counts, expected)]
    counts, expected = torch.cat((counts[~small], rest[0])), torch.cat((expected[~small], rest[1]))
    kept = expected > 1e-9
    assert counts[~kept].sum() == 0  # nothing that must not be drawn
    counts, expected = counts[kept], expected[kept]
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


CHANCE = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "odd order": {"temperature": 1.3, "top_k": 9, "typical_p": 0.9, "renormalize_logits": True},
}


@pytest.fixture
def small_model():
    return tiny_llama(seed=5, vocab_size=VOCAB, num_hidden_layers=1)


@pytest.mark.parametrize("name", CHANCE)
def test_distribution(small_model, name):
    """Two tokens: the second is drawn from what follows the first."""
    settings = dict(do_sample=True, max_new_tokens=2, top_k=0) | CHANCE[name]
    prompt, n = torch.tensor([[3, 7, 2]]), 3000
    scored = dict(output_scores=True, return_dict_in_generate=True)
    first = small_model.generate(prompt, **settings, **scored).scores[0].softmax(-1)[0].double()
    follow = torch.cat((prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]), -1)
    second = small_model.generate(follow, **settings, **scored).scores[0].softmax(-1).double()
    torch.manual_seed(11)
    config = {"max_sequences": n, "num_pages": 4 * n, "check": False}
    drawn = small_model.generate(
        prompt, num_return_sequences=n, **settings, cache_implementation="paged", cache_config=config
    )[:, 3:]
    counts = torch.bincount(drawn[:, 0] * VOCAB + drawn[:, 1], minlength=VOCAB * VOCAB).double()
    expected = (first[:, None] * second).flatten() * n
    assert p_value(counts, expected) > 0.001
    assert p_value(counts.view(VOCAB, VOCAB).sum(1), first * n) > 0.001


def test_set_seed(model, batch):
    arguments = dict(batch, do_sample=True, max_new_tokens=8, cache_implementation="paged")
    results = []
    for seed in (7, 7, 8):
        set_seed(seed)
        results.append([model.generate(**arguments).tolist() for _ in range(2)])
    assert results[0] == results[1] != results[2]
    assert results[0][0] != results[0][1]


def test_rows_draw_their_own(model):
    prompt = prompts_of(6)[0]
    torch.manual_seed(0)
    out = model.generate(prompt.expand(4, -1), do_sample=True, max_new_tokens=8, cache_implementation="paged")
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_the_callers_generator(model, batch):
    before = torch.manual_seed(3).get_state()
    torch.randint(0, 2**63 - 1, (1,))
    once = torch.get_rng_state()
    assert not torch.equal(before, once)
    torch.manual_seed(3)
    model.generate(**batch, max_new_tokens=8, cache_implementation="paged")  # greedy; makes the engine, too
    assert torch.equal(torch.get_rng_state(), before)
    model.generate(**batch, do_sample=True, max_new_tokens=8, cache_implementation="paged")
    assert torch.equal(torch.get_rng_state(), once)


def test_a_seed_in_the_settings(model, batch):
    arguments = dict(batch, do_sample=True, max_new_tokens=8, cache_implementation="paged", cache_config={"seed": 4})
    before = torch.get_rng_state()
    first = model.generate(**arguments)
    assert torch.equal(torch.get_rng_state(), before)
    hf_paged.enable(check=True, page_size=4, num_pages=512)
    again = tiny_llama().generate(**arguments)
    assert again.tolist() == first.tolist()


def test_a_row_draws_the_same_alone_and_in_a_batch(model):
    """The first row of a batch has the seed of a batch of one."""
    prompts = prompts_of(9, 4, 13)
    results = []
    for size in (1, 3):
        torch.manual_seed(9)
        batch = left_padded([prompts[2], *prompts[:2]][:size])
        results.append(model.generate(**batch, do_sample=True, max_new_tokens=9, cache_implementation="paged"))
    assert results[0][0].tolist() == results[1][0].tolist()


# -- what goes to transformers' loop

BEAMS = {
    "beams": {"num_beams": 3},
    "beams with an end": {"num_beams": 3, "eos_token_id": 11, "early_stopping": True, "length_penalty": 0.5},
    "beams, many returned": {"num_beams": 4, "num_return_sequences": 3},
    "sampling beams": {"num_beams": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.7},
    "watermark": {"watermarking_config": fresh(lambda: WatermarkingConfig(bias=4.0, seeding_scheme="lefthash"))},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", BEAMS)
def test_loop(model, batch, ways, name):
    results = []
    for extra in ({}, {"cache_implementation": "paged"}):
        settings = {k: v.make() if isinstance(v, fresh) else v for k, v in BEAMS[name].items()}
        torch.manual_seed(1)
        results.append(model.generate(**batch, max_new_tokens=8, **settings, **extra).tolist())
    assert results[0] == results[1] and ways.taken() == "loop"
    assert engine_of(model) is None


def test_beams_through_a_config(model, batch):
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=3, max_new_tokens=6, pad_token_id=PAD)
    plain = model.generate(**batch, generation_config=config)
    config.cache_implementation = "paged"
    assert model.generate(**batch, generation_config=config).tolist() == plain.tolist()
    model.generation_config.cache_implementation = "paged"
    assert model.generate(**batch, num_beams=3, max_new_tokens=6).tolist() == plain.tolist()


def test_negative_prompts(model, rows, ways):
    negative = torch.cat(prompts_of(4, 4, 4, seed=5))
    arguments = dict(rows, negative_prompt_ids=negative, max_new_tokens=6)
    assert_equal(model, **arguments, guidance_scale=2.0)
    mask = torch.ones_like(negative)
    assert_equal(model, **arguments, guidance_scale=2.0, negative_prompt_attention_mask=mask)
    assert_equal(model, **arguments)
    assert ways.taken() == "loop"


@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted(model, rows, helper):
    given = {helper: tiny_llama(seed=1) if helper == "assistant_model" else 3}
    for length in (1, 6, 20):
        prompt = prompts_of(length)[0]
        assert_equal(model, inputs=torch.cat((prompt, prompt), -1), max_new_tokens=12, **given)
    assert_equal(model, inputs=prompt, max_new_tokens=12, assistant_model=model)
    same_error(model, **rows, max_new_tokens=4, **given)


@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 2, "force_words_ids": [[4]]},
        {"dola_layers": "high"},
    ],
)
def test_strategies_that_transformers_gave_away(model, rows, search):
    assert "trust_remote_code" in same_error(model, **rows, max_new_tokens=4, **search)


def test_synced_gpus(model, rows):
    assert_equal(model, **rows, max_new_tokens=4, synced_gpus=False)
    with pytest.raises((ValueError, RuntimeError), match="process group"):
        model.generate(**rows, max_new_tokens=4, synced_gpus=True, cache_implementation="paged")


# -- names


def test_unknown_arguments(model, rows):
    assert "temprature" in same_error(model, **rows, temprature=0.5)
    assert "draft_model" in same_error(model, **rows, draft_model=3)


def test_settings_of_the_engine(model, rows):
    assert_equal(model, **rows, max_new_tokens=4)
    assert engine_of(model).config.page_size == 4
    model.generate(**rows, max_new_tokens=4, cache_implementation="paged", cache_config={"page_size": 8})
    config = engine_of(model).config
    assert (config.page_size, config.num_pages, config.check) == (8, 512, True)
    model.generation_config.cache_config = {"page_size": 2}
    model.generate(**rows, max_new_tokens=4, cache_implementation="paged")
    assert engine_of(model).config.page_size == 2
    model.generation_config.cache_config = None
    for bad, words in (
        ({"pagesize": 8}, ("pagesize", "page_size")),
        ({"page_size": 0}, ("page_size", "0")),
        ({"prefix_caching": True}, ("prefix_caching",)),
    ):
        with pytest.raises(ValueError) as error:
            model.generate(**rows, cache_implementation="paged", cache_config=bad)
        assert all(word in str(error.value) for word in words)


def test_settings_of_enable():
    with pytest.raises(ValueError, match="pagesize"):
        hf_paged.enable(pagesize=4)


def test_other_cache_implementations(model, rows):
    plain = model.generate(**rows, max_new_tokens=4).tolist()
    for name in ("dynamic", "static", "offloaded") if torch.cuda.is_available() else ("dynamic", "static"):
        assert model.generate(**rows, max_new_tokens=4, cache_implementation=name).tolist() == plain
    with pytest.raises(ValueError, match="no such"):
        model.generate(**rows, max_new_tokens=4, cache_implementation="no such")
    assert engine_of(model) is None


# -- the strategy


def test_custom_generate(rows, ways):
    hf_paged.disable()
    model, batch = tiny_llama(), left_padded(prompts_of(9, 4, 13))
    for settings in ({}, {"repetition_penalty": 1.5}, {"return_dict_in_generate": True, "output_scores": True}):
        plain = model.generate(**batch, max_new_tokens=8, **settings)
        ours = model.generate(**batch, max_new_tokens=8, custom_generate=hf_paged.generate, **settings)
        if settings.get("output_scores"):
            plain, ours = plain.sequences, ours.sequences
        assert ours.tolist() == plain.tolist()
    assert ways.taken() == "engine"
    model.generate(
        **rows, max_new_tokens=2, custom_generate=hf_paged.generate, engine_config={"page_size": 2, "num_pages": 64}
    )
    assert engine_of(model).config.page_size == 2
    with pytest.raises(ValueError, match="draft_model"):
        model.generate(**rows, custom_generate=hf_paged.generate, draft_model=model)
    beams = dict(batch, max_new_tokens=6, num_beams=3)
    assert model.generate(**beams, custom_generate=hf_paged.generate).tolist() == model.generate(**beams).tolist()
    with pytest.raises(ValueError, match="assisted_generation"):
        model.generate(prompts_of(5)[0], prompt_lookup_num_tokens=2, custom_generate=hf_paged.generate)


def test_both_doors(model, rows):
    plain = model.generate(**rows, max_new_tokens=4)
    both_doors = dict(custom_generate=hf_paged.generate, cache_implementation="paged")
    assert model.generate(**rows, max_new_tokens=4, **both_doors).tolist() == plain.tolist()
    assert engine_of(model).config.page_size == 4

    def own(model, input_ids, **kwargs):
        return input_ids + 1

    out = model.generate(**rows, max_new_tokens=4, custom_generate=own, cache_implementation="paged")
    assert out.tolist() == (rows["input_ids"] + 1).tolist()


def test_enable_and_disable(rows):
    from transformers import GenerationMixin

    model = spread(
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    )
    hf_paged.enable()
    hf_paged.enable(page_size=8)
    hf_paged.disable()
    original = GenerationMixin.generate
    hf_paged.disable()
    assert GenerationMixin.generate is original and not hasattr(original, "_hf_paged_original")
    hf_paged.enable(page_size=8, num_pages=64)
    assert_equal(model, **rows, max_new_tokens=4)
    assert engine_of(model).config.page_size == 8
