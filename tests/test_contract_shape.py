"""The generate contract, "Shape and inputs": each line against `generate` without the argument."""

import pytest
import torch
from conftest import (
    BOS,
    PAD,
    assert_clean,
    assert_equal,
    both,
    engine_of,
    fresh,
    left_padded,
    prompts_of,
    tiny_llama,
)
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig, pipeline

pytestmark = pytest.mark.usefixtures("paged")


def ending_early(model, batch, at=(3, 6)):
    """Ids that end some rows of the batch early: what greedy rows 0 and 1 say at these places."""
    new = model.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    return [int(new[row, place]) for row, place in enumerate(at)]


@pytest.fixture
def batch():
    """One row more than elsewhere, of a single token."""
    return left_padded(prompts_of(9, 4, 13, 1))


# -- how the call is made


@pytest.mark.parametrize("where", ["keyword", "config", "model", "model beside config", "positional"])
def test_ways_to_ask(model, batch, ways, where):
    plain = model.generate(**batch, max_new_tokens=6)
    if where == "keyword":
        paged = model.generate(**batch, max_new_tokens=6, cache_implementation="paged")
    elif where == "config":
        config = GenerationConfig(max_new_tokens=6, cache_implementation="paged", pad_token_id=PAD)
        paged = model.generate(**batch, generation_config=config)
        assert config.cache_implementation == "paged"  # the caller's own, untouched
    elif where == "positional":
        config = GenerationConfig(max_new_tokens=6, cache_implementation="paged", pad_token_id=PAD)
        paged = model.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"])
    else:
        model.generation_config.cache_implementation = "paged"
        given = {"max_new_tokens": 6}
        if where == "model beside config":
            given = {"generation_config": GenerationConfig(max_new_tokens=6, pad_token_id=PAD)}
        paged = model.generate(**batch, **given)
        assert model.generation_config.cache_implementation == "paged"
    assert paged.tolist() == plain.tolist()
    assert ways.taken() == "engine"
    assert engine_of(model).stats().generated_tokens == 4 * 6


def test_the_keyword_goes_before_the_config(model, batch):
    config = GenerationConfig(max_new_tokens=3, cache_implementation="paged", pad_token_id=PAD)
    model.generate(**batch, generation_config=config, cache_implementation="dynamic")
    assert engine_of(model) is None
    model.generation_config.cache_implementation = "paged"
    model.generate(**batch, max_new_tokens=3, cache_implementation="dynamic")
    assert engine_of(model) is None


# -- rows


def test_a_row(model):
    result = assert_equal(model, inputs=prompts_of(7)[0], max_new_tokens=10)
    assert result.shape == (1, 17)
    assert_clean(model)


def test_rows_that_end_early(model, batch, ways):
    ends = ending_early(model, batch)
    result = assert_equal(model, **batch, max_new_tokens=12, eos_token_id=ends)
    assert (result[0, -1], result[1, -1]) == (PAD, PAD)
    result = assert_equal(model, **batch, max_new_tokens=12, eos_token_id=ends[0], pad_token_id=5)
    assert result[0, -1] == 5
    assert ways.taken() == "engine"
    assert_clean(model)


def test_all_rows_end_early(model):
    batch = left_padded(prompts_of(9, 4))
    ends = ending_early(model, batch, at=(3, 5))
    result = assert_equal(model, **batch, max_new_tokens=12, eos_token_id=ends)
    assert result.shape[1] < batch["input_ids"].shape[1] + 12


def test_no_pad_token(model):
    batch = {"input_ids": torch.cat(prompts_of(5, 5))}
    ends = ending_early(model, batch)
    model.generation_config.pad_token_id = None
    assert_equal(model, **batch, max_new_tokens=12, eos_token_id=ends)


def test_left_padded_rows_equal_each_row_alone(model):
    prompts = prompts_of(9, 4, 13, 1)
    result = assert_equal(model, **left_padded(prompts), max_new_tokens=12)
    for row, prompt in zip(result, prompts, strict=True):
        alone = model.generate(prompt, max_new_tokens=12)
        assert row[13 - prompt.shape[1] :].tolist() == alone[0].tolist()


@pytest.mark.parametrize("eos", [None, 7, PAD])
def test_pads_without_a_mask(model, batch, eos):
    assert_equal(model, input_ids=batch["input_ids"], max_new_tokens=8, eos_token_id=eos)


def test_ids_of_other_types(model, batch):
    for dtype in (torch.int32, torch.int64):
        mask = batch["attention_mask"]
        assert_equal(model, input_ids=batch["input_ids"].to(dtype), attention_mask=mask, max_new_tokens=4)


def test_a_mask_of_other_types(model, batch):
    for dtype in (torch.bool, torch.float32, torch.int32):
        assert_equal(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].to(dtype))


def test_right_pads_and_holes(model, batch, ways):
    ids = batch["input_ids"].flip(1)
    assert_equal(model, input_ids=ids, attention_mask=ids.ne(PAD).long(), max_new_tokens=6)
    assert ways.taken() == "loop"
    batch["attention_mask"][2, 5] = 0
    assert_equal(model, **batch, max_new_tokens=6)
    assert ways.taken() == "loop"


def test_a_row_of_pads_only(model, batch):
    batch["attention_mask"][1] = 0
    assert_equal(model, **batch, max_new_tokens=6)


def test_position_ids(model, ways):
    ids = prompts_of(6)[0]
    assert_equal(model, input_ids=ids, position_ids=torch.arange(6)[None], max_new_tokens=5)
    assert ways.taken() == "engine"
    assert_equal(model, input_ids=ids, position_ids=torch.arange(3, 9)[None], max_new_tokens=5)
    assert ways.taken() == "loop"


def test_more_rows_than_run_at_once(model):
    batch = {"input_ids": torch.cat(prompts_of(*[5] * 7))}
    assert_equal(model, **batch, max_new_tokens=5, cache_config=fresh(lambda: None))
    paged = model.generate(**batch, max_new_tokens=5, cache_implementation="paged", cache_config={"max_sequences": 2})
    assert paged.tolist() == model.generate(**batch, max_new_tokens=5).tolist()


# -- num_return_sequences


def test_num_return_sequences_without_chance(model):
    """top_k=1 leaves one token: rows of one prompt stand together, and equal."""
    batch = left_padded(prompts_of(9, 4))
    result = assert_equal(model, **batch, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    assert result.shape == (6, 15)
    assert engine_of(model).stats().prompt_tokens == 9 + 4  # each prompt computed once


def test_num_return_sequences_greedy_is_refused(model):
    prompt, errors = prompts_of(4)[0], []
    for extra in ({}, {"cache_implementation": "paged"}):
        with pytest.raises(ValueError) as error:
            model.generate(prompt, max_new_tokens=2, do_sample=False, num_return_sequences=2, **extra)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_num_return_sequences_draws_apart(model):
    torch.manual_seed(3)
    batch = left_padded(prompts_of(9, 4))
    out = model.generate(
        **batch, max_new_tokens=8, do_sample=True, num_return_sequences=4, cache_implementation="paged"
    )
    assert out.shape == (8, 17)
    assert out[:4, :9].tolist() == batch["input_ids"][:1].tolist() * 4
    assert len({tuple(row) for row in out.tolist()}) == 8
    assert engine_of(model).stats().prompt_tokens == 9 + 4
    assert_clean(model)


# -- odd inputs


def test_inputs_embeds(model, ways):
    batch = left_padded(prompts_of(6, 3))
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    mask = batch["attention_mask"]
    plain, paged = both(model, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6)
    assert paged.tolist() == plain.tolist() and paged.shape == (2, 6)
    assert ways.taken() == "loop"
    assert_equal(model, input_ids=batch["input_ids"], inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6)


def test_past_key_values_given(model):
    prompt, errors = prompts_of(4)[0], []
    for name in ("dynamic", "paged"):
        with pytest.raises(ValueError) as error:
            model.generate(prompt, past_key_values=DynamicCache(), max_new_tokens=2, cache_implementation=name)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_prompt_of_one_token(model, ways):
    assert_equal(model, input_ids=torch.tensor([[5]]), max_new_tokens=7)
    assert_equal(model, input_ids=torch.tensor([[5], [6]]), max_new_tokens=7)
    assert ways.taken() == "engine"


def test_no_prompt(model, ways):
    result = assert_equal(model, max_new_tokens=7)
    assert result[0, 0] == BOS and ways.taken() == "engine"
    assert_equal(model, input_ids=None, max_new_tokens=7)


def test_an_empty_prompt(model):
    """Whatever `generate` makes of `[1, 0]`: the same result, or the same kind of error."""
    empty, outcomes = torch.zeros(1, 0, dtype=torch.long), []
    for extra in ({}, {"cache_implementation": "paged"}):
        try:
            outcomes.append(model.generate(empty, max_new_tokens=4, **extra).tolist())
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


def test_token_ids_outside_the_vocabulary(model):
    for bad in (99, 1000, -1):
        with pytest.raises((ValueError, IndexError)) as error:
            model.generate(torch.tensor([[5, bad]]), max_new_tokens=2, cache_implementation="paged")
        assert str(bad) in str(error.value)
    assert_equal(model, input_ids=torch.tensor([[5, 98]]), max_new_tokens=4)
    assert_clean(model)


# -- lengths


def test_max_length(model, batch):
    assert_equal(model, **batch, max_length=20)
    assert_equal(model, **batch, max_length=14)
    assert_equal(model, **batch)  # 20 new tokens
    assert_equal(model, **batch, max_length=20, max_new_tokens=2)
    for extra in ({}, {"cache_implementation": "paged"}):
        with pytest.raises(ValueError, match="max_length"):
            model.generate(**batch, max_length=13, **extra)
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(**batch, max_new_tokens=0, **extra)


def test_longer_than_the_model_was_made_for():
    model = tiny_llama(max_position_embeddings=16)
    assert_equal(model, inputs=prompts_of(6)[0])
    assert_equal(model, inputs=prompts_of(6)[0], max_new_tokens=30)
    assert_equal(model, inputs=prompts_of(20)[0], max_new_tokens=4)


@pytest.mark.parametrize("limits", [{"min_length": 19}, {"min_new_tokens": 7}, {"min_new_tokens": 50}])
def test_minimal_lengths(model, batch, limits):
    ends = ending_early(model, batch)
    assert_equal(model, **batch, max_new_tokens=12, eos_token_id=ends, **limits)


# -- what is returned


def assert_same_output(plain, paged):
    assert type(paged) is type(plain)
    assert set(paged.keys()) == set(plain.keys())
    assert paged.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        ours, theirs = getattr(paged, name), getattr(plain, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert len(ours) == len(theirs) and isinstance(ours, tuple)
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype
                assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert paged.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


@pytest.mark.parametrize("wanted", [(), ("output_scores",), ("output_logits",), ("output_scores", "output_logits")])
@pytest.mark.parametrize("ending", [False, True])
def test_return_dict(model, batch, ways, wanted, ending):
    asked = dict.fromkeys(wanted, True) | {"return_dict_in_generate": True}
    asked["eos_token_id"] = ending_early(model, batch) if ending else None
    plain, paged = both(model, **batch, max_new_tokens=10, sequence_bias=[[[3], 1.5]], **asked)
    assert_same_output(plain, paged)
    assert ways.taken() == "engine"
    assert_clean(model)


def test_scores_of_all_rows_ended(model):
    batch = left_padded(prompts_of(9, 4))
    ends = ending_early(model, batch, at=(3, 5))
    asked = dict(output_scores=True, output_logits=True, return_dict_in_generate=True, eos_token_id=ends)
    plain, paged = both(model, **batch, max_new_tokens=12, **asked)
    assert len(paged.scores) < 12
    assert_same_output(plain, paged)


def test_scores_of_sampling(model, batch):
    asked = dict(output_scores=True, output_logits=True, return_dict_in_generate=True)
    asked |= dict(do_sample=True, temperature=0.7, top_k=1, top_p=0.9)
    plain, paged = both(model, **batch, max_new_tokens=6, **asked)
    assert_same_output(plain, paged)
    transition = model.compute_transition_scores(paged.sequences, paged.scores)
    assert_close(transition, model.compute_transition_scores(plain.sequences, plain.scores))


@pytest.mark.parametrize("config", [{}, {"max_sequences": 2}, {"num_pages": 10}])
def test_scores_of_several_sequences(model, config):
    """Rows that have ended go on beside those that wait to begin."""
    batch = left_padded(prompts_of(9, 4))
    settings = dict(max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    new = model.generate(**batch, **settings)[:, 9:]
    settings |= dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    settings["eos_token_id"] = [int(new[0, 2]), int(new[3, 4])]
    plain = model.generate(**batch, **settings)
    paged = model.generate(**batch, **settings, cache_implementation="paged", cache_config=config)
    assert_same_output(plain, paged)
    assert_clean(model)


def test_the_returned_cache_goes_on(model):
    prompt = prompts_of(6)[0]
    outputs = both(model, inputs=prompt, max_new_tokens=5, return_dict_in_generate=True)
    for ours, theirs in zip(outputs[1].past_key_values, outputs[0].past_key_values, strict=True):
        assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    later = [model.generate(o.sequences, past_key_values=o.past_key_values, max_new_tokens=5) for o in outputs]
    assert later[0].tolist() == later[1].tolist()


def test_scores_without_a_dict(model, batch):
    assert_equal(model, **batch, max_new_tokens=4, output_scores=True)


@pytest.mark.parametrize("field", ["attentions", "hidden_states"])
def test_attentions_and_hidden_states(model, batch, ways, field):
    model.set_attn_implementation("eager")
    asked = {f"output_{field}": True, "return_dict_in_generate": True}
    plain, paged = both(model, **batch, max_new_tokens=4, **asked)
    assert ways.taken() == "loop"
    assert_same_output(plain, paged)
    ours, theirs = getattr(paged, field), getattr(plain, field)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, atol=1e-4, rtol=1e-4)


# -- the pool


def test_a_prompt_larger_than_the_pool(model):
    small = {"page_size": 4, "num_pages": 3}
    long, short = prompts_of(20, 5)
    with pytest.raises(ValueError) as error:
        model.generate(long, max_new_tokens=2, cache_implementation="paged", cache_config=small)
    assert "20 tokens" in str(error.value) and "3 pages of 4 tokens" in str(error.value)
    paged = model.generate(short, max_new_tokens=4, cache_implementation="paged", cache_config=small)
    assert paged.tolist() == model.generate(short, max_new_tokens=4).tolist()
    assert_clean(model)


def test_a_pool_that_holds_one_row_at_a_time(model):
    batch = left_padded(prompts_of(9, 4, 7))
    small = {"page_size": 4, "num_pages": 5}
    paged = model.generate(**batch, max_new_tokens=8, cache_implementation="paged", cache_config=small)
    assert paged.tolist() == model.generate(**batch, max_new_tokens=8).tolist()
    assert_clean(model)


# -- pipelines

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"return_full_text": False}, {"return_tensors": True}])
def test_pipeline(text_model, tokenizer, ways, size, options):
    pipe = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
    texts = ["def main():", "import os, sys\nprint(os)", "class A", "x = 1"]
    arguments = dict(max_new_tokens=6, do_sample=False, batch_size=size, **options)
    plain = pipe(texts, **arguments)
    assert engine_of(text_model) is None
    assert pipe(texts, **arguments, cache_implementation="paged") == plain
    assert pipe(texts[0], **arguments, cache_implementation="paged") == pipe(texts[0], **arguments)
    assert ways.taken() == "engine" and engine_of(text_model) is not None


def test_pipeline_with_several_sequences(text_model, tokenizer):
    pipe = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
    arguments = dict(max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    plain = pipe(["def main():", "import os"], **arguments)
    paged = pipe(["def main():", "import os"], **arguments, cache_implementation="paged")
    assert paged == plain and [len(group) for group in paged] == [3, 3]


def test_pipeline_with_chats(text_model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    pipe = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
    chats = [[{"role": "user", "content": "What is a list?"}], [{"role": "user", "content": "Sort it, please."}]]
    for given in (chats[0], chats):
        plain = pipe(given, max_new_tokens=6, do_sample=False)
        assert pipe(given, max_new_tokens=6, do_sample=False, cache_implementation="paged") == plain
