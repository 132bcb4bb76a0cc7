"""The generate contract, "Models": the same tokens as `generate`, by the way that each model allows."""

import gc
import weakref

import pytest
import torch
from conftest import assert_clean, assert_equal, engine_of, left_padded, prompts_of
from tiny_models import ALTERNATE, ENGINE, EXPERTS, HEADS, LOOP, OWN_CACHE, SLIDING, make

pytestmark = pytest.mark.usefixtures("paged")


def assert_varied(tokens, batch):
    """Or equality would say little: some rows do more than repeat a token."""
    new = tokens[:, batch["input_ids"].shape[1] :] if tokens.shape[1] > 21 else tokens
    assert len(set(new.flatten().tolist())) > 5


@pytest.mark.parametrize("stem", ENGINE)
def test_on_the_engine(stem, batch, ways):
    model = make(stem, ENGINE[stem])
    tokens = assert_equal(model, **batch, max_new_tokens=20)
    assert ways.taken() == "engine"
    assert_varied(tokens, batch)
    # Prompts in chunks, pages that no chunk ends with, rows that wait for each other.
    odd = {"max_batch_tokens": 6, "page_size": 3, "num_pages": 24, "max_sequences": 2}
    paged = model.generate(**batch, max_new_tokens=20, cache_implementation="paged", cache_config=odd)
    assert paged.tolist() == tokens.tolist()
    assert_clean(model)


@pytest.mark.parametrize("stem", LOOP)
def test_in_the_loop_over_pages(stem, batch, ways):
    model = make(stem, LOOP[stem])
    assert_varied(assert_equal(model, **batch, max_new_tokens=20), batch)
    assert ways.taken() == "loop"
    assert_equal(model, **batch, max_new_tokens=8, num_beams=3)
    assert ways.taken() == "loop"


@pytest.mark.parametrize("stem", OWN_CACHE)
def test_with_its_own_cache(stem, batch, ways):
    model = make(stem, OWN_CACHE[stem])
    assert_varied(assert_equal(model, **batch, max_new_tokens=20), batch)
    assert ways.taken() == "own cache"
    assert engine_of(model) is None


@pytest.mark.parametrize("stem", ["Falcon", "Bamba", "Gemma2"])
def test_a_model_is_freed(stem, batch):
    """Whether it has an engine, or words that say why it has none."""
    model = make(stem, {**ENGINE, **LOOP, **OWN_CACHE}[stem])
    for _ in range(2):
        model.generate(**batch, max_new_tokens=3, cache_implementation="paged")
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


# -- what a look at a few tokens would not show


@pytest.mark.parametrize("stem", ["Mistral", "Qwen2", "Gemma2", "GptOss"])
def test_a_window_that_is_told_to_attention(stem, batch, ways):
    """Too long for the look at the model, which takes a few tokens: attention asks for it, so that is well."""
    model = make(stem, ENGINE[stem] | {"sliding_window": 70})
    long = left_padded(prompts_of(66, 75))
    assert_equal(model, **long, max_new_tokens=20)
    assert ways.taken() == "engine"


def test_a_window_that_only_the_mask_knows(ways):
    settings = EXPERTS | dict(moe_intermediate_size=24, shared_expert_intermediate_size=24, sliding_window=70)
    model = make("Qwen2Moe", settings | ALTERNATE | {"use_sliding_window": True})
    assert_equal(model, **left_padded(prompts_of(66, 75)), max_new_tokens=20)
    assert ways.taken() == "loop"


ROPES = {
    "dynamic": ("Llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
    "longrope": (
        "Phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [3.0, 2.5, 2.0, 1.5],
            "rope_theta": 10000.0,
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_that_depend_on_the_longest_row(kind, ways):
    """A short row must not see what a long one in the same step changes."""
    stem, rope = ROPES[kind]
    settings = {"max_position_embeddings": 24, "rope_parameters": rope}
    if kind == "longrope":
        settings |= {"original_max_position_embeddings": 24, "max_position_embeddings": 96}
    model, other = make(stem, settings), make(stem, settings)  # transformers keeps a state in such a model
    batch = left_padded(prompts_of(9, 4, 13))
    calls = [(batch, 10, "engine"), (batch, 20, "loop"), (batch, 10, "engine")]
    calls += [({"inputs": row}, 8, "loop") for row in prompts_of(20, 40)] + [(batch, 10, "engine")]
    for given, length, way in calls:
        paged = model.generate(**given, max_new_tokens=length, cache_implementation="paged")
        assert paged.tolist() == other.generate(**given, max_new_tokens=length).tolist()
        assert ways.taken() == way


@pytest.mark.parametrize("stem", ["Llama", "Mistral", "Gemma3", "GptOss", "OPT"])
def test_the_returned_cache_goes_on(stem, batch):
    """Also where a layer keeps its window alone."""
    model = make(stem, ENGINE[stem])
    results = []
    for extra in ({}, {"cache_implementation": "paged"}):
        out = model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, **extra)
        mask = torch.cat((batch["attention_mask"], torch.ones(3, 6, dtype=torch.long)), -1)
        later = model.generate(
            out.sequences, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=9
        )
        results.append(later.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_implementations_of_attention(implementation, batch, ways):
    for stem in ("Llama", "Gemma3", "GPTNeoX"):
        model = make(stem, ENGINE[stem])
        model.set_attn_implementation(implementation)
        assert_equal(model, **batch, max_new_tokens=8)
        assert ways.taken() == "engine"
        assert model.config._attn_implementation == implementation


def test_half_precision(batch, ways):
    """Tokens of half precision may differ at near ties; the way is the engine's, and results are of the right shape."""
    model = make("Qwen3", HEADS | SLIDING).to(torch.bfloat16)
    assert model.generate(**batch, max_new_tokens=8, cache_implementation="paged").shape == (3, 21)
    assert ways.taken() == "engine"
