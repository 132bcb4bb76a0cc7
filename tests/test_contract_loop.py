"""The generate contract, "Arguments": what transformers' own loop runs, and the names that are refused."""

import pytest
import torch
from conftest import PAD, assert_equal, engine_of, fresh, left_padded, prompts_of, same_error, spread, tiny_llama
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, WatermarkingConfig

import hf_paged
from hf_paged.config import EngineConfig
from hf_paged.integrations import doors

pytestmark = pytest.mark.usefixtures("paged")


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
    # transformers takes one row only.
    ours = model.generate(**rows, max_new_tokens=4, cache_implementation="paged", **given)
    assert ours.tolist() == model.generate(**rows, max_new_tokens=4).tolist()


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


def test_token_healing(text_model, tokenizer, ways):
    text_model.generation_config.bos_token_id = 0
    inputs = tokenizer("def ma", return_tensors="pt", return_token_type_ids=False)
    assert_equal(text_model, **inputs, max_new_tokens=5, token_healing=True, tokenizer=tokenizer)
    assert ways.taken() == "loop"


def test_a_model_that_is_spread_over_processes(model, rows, ways, monkeypatch):
    """The processes must make the same forwards."""
    monkeypatch.setattr(doors, "runs_in_step_with_others", lambda model: True)
    assert_equal(model, **rows, max_new_tokens=4)
    assert ways.taken() == "loop"


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
        ({"prefix_caching": 1}, ("prefix_caching", "1")),
        ({"cache_salt": 1}, ("cache_salt", "1")),
        ([4], ("cache_config", "[4]")),
    ):
        with pytest.raises(ValueError) as error:
            model.generate(**rows, cache_implementation="paged", cache_config=bad)
        assert all(word in str(error.value) for word in words)


def test_settings_that_replace_each_other(model, rows):
    """`enable` gave num_pages; a call may ask for a share of memory instead."""
    arguments = dict(rows, max_new_tokens=2, cache_implementation="paged")
    model.generate(**arguments, cache_config={"memory_fraction": 0.01})
    config = engine_of(model).config
    assert (config.num_pages, config.memory_fraction, config.page_size) == (None, 0.01, 4)
    model.generate(**arguments, cache_config=EngineConfig(num_pages=32))
    assert engine_of(model).config.num_pages == 32
    with pytest.raises(ValueError, match="memory_fraction"):
        model.generate(**arguments, cache_config={"memory_fraction": 0.01, "num_pages": 32})


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
        model.generate(**rows, custom_generate=hf_paged.generate, draft_model=3)
    beams = dict(batch, max_new_tokens=6, num_beams=3)
    assert model.generate(**beams, custom_generate=hf_paged.generate).tolist() == model.generate(**beams).tolist()
    assert ways.taken() == "loop"
    plain = model.generate(**batch, max_new_tokens=8)
    ours = model.generate(**batch, max_new_tokens=8, prompt_lookup_num_tokens=2, custom_generate=hf_paged.generate)
    assert ours.tolist() == plain.tolist() and ways.taken() == "engine"


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
