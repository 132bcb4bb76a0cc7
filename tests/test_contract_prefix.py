"""Prefixes shared across calls of `generate`, and what makes stored KV void."""

import pytest
import torch
from conftest import assert_clean, assert_equal, engine_of, left_padded, prompts_of
from state_helpers import generate, plain, tiny_neox
from tiny_models import spread
from transformers import MistralConfig, MistralForCausalLM, pipeline, set_seed

import hf_paged
from hf_paged import Engine, SamplingParams

pytestmark = pytest.mark.usefixtures("paged")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def cached(model):
    """Prompt tokens found since the last look."""
    engine = engine_of(model)
    count = engine.stats().cached_tokens
    engine.reset_stats()
    return count


@pytest.fixture
def shared():
    """Three prompts that begin alike, left-padded."""
    (header,) = prompts_of(17, seed=4)
    return left_padded([torch.cat([header, tail], 1) for tail in prompts_of(3, 5, 1, seed=5)])


def test_rows_and_calls_share(model, shared):
    assert_equal(model, **shared, max_new_tokens=8)
    assert cached(model) >= 2 * 16
    assert_equal(model, **shared, max_new_tokens=8)
    total = int(shared["attention_mask"].sum())
    assert cached(model) == total - 3, "all but the last token of each prompt"
    assert_clean(model)


def test_sampled_tokens_are_the_same_hit_or_cold(model, shared):
    settings = dict(max_new_tokens=10, do_sample=True, temperature=0.9, num_return_sequences=2)
    tokens = []
    for _ in range(3):
        set_seed(5)
        tokens.append(generate(model, shared, **settings).tolist())
    assert tokens[0] == tokens[1] == tokens[2] and cached(model) > 0


def test_a_pipeline_shares(text_model, tokenizer):
    pipe = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
    settings = dict(max_new_tokens=4, do_sample=False, cache_implementation="paged")
    first = pipe("Question: What is 2 + 3?\nAnswer:", **settings)
    cached(text_model)
    assert pipe("Question: What is 2 + 3?\nAnswer:", **settings) == first
    assert cached(text_model) > 4


@pytest.mark.parametrize("way", ["argument", "cache_config", "enable"])
def test_sharing_turned_off(model, shared, way):
    rest = {}
    if way == "enable":
        hf_paged.enable(check=True, page_size=4, num_pages=512, prefix_caching=False)
    else:
        rest = {"prefix_caching": False} if way == "argument" else {"cache_config": {"prefix_caching": False}}
    for _ in range(2):
        assert generate(model, shared, **rest).tolist() == plain(model, shared)
        assert cached(model) == 0
    engine = engine_of(model)
    hf_paged.enable(check=True, page_size=4, num_pages=512)
    generate(model, shared)
    assert engine_of(model) is engine, "a switch is no reason for another engine"


@pytest.mark.parametrize("way", ["argument", "cache_config", "strategy"])
def test_salts(model, shared, way):
    def call(salt):
        if way == "strategy":
            settings = {"page_size": 4, "num_pages": 512}
            out = model.generate(
                **shared, max_new_tokens=8, custom_generate=hf_paged.generate, engine_config=settings, cache_salt=salt
            )
        else:
            rest = {"cache_salt": salt} if way == "argument" else {"cache_config": {"cache_salt": salt}}
            out = generate(model, shared, **rest)
        assert out.tolist() == plain(model, shared)
        return cached(model)

    cold, other = call("a"), call("b")
    assert cold == other < call("a")


@pytest.mark.parametrize("bad", [{"cache_salt": 3}, {"cache_salt": ""}, {"prefix_caching": "no"}])
def test_bad_values_are_refused(model, shared, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        generate(model, shared, **bad)


def changes(model):
    """Ways in which weights change; each is done when it is yielded."""
    weight = model.get_input_embeddings().weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
    optimizer.step()
    yield "optimizer.step"
    other = type(model)(model.config)
    spread(other)
    model.load_state_dict(other.state_dict())
    yield "load_state_dict"
    weight.data.mul_(1.5)
    yield "data.mul_"
    weight.data.copy_(torch.randn_like(weight))
    yield "data.copy_"
    model.config.rms_norm_eps = model.config.layer_norm_eps = 0.5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    yield "settings"


@pytest.mark.parametrize("make", ["lean", "module"])
def test_changed_weights_void_what_was_kept(model, shared, make):
    model = model if make == "lean" else tiny_neox()
    generate(model, shared)
    for name in changes(model):
        cached(model)
        tokens = generate(model, shared).tolist()
        assert tokens == plain(model, shared), name
        assert cached(model) < 40, f"{name}: only what rows of the call share"


def test_another_dtype_on_an_engine_of_ones_own(model):
    prompt = prompts_of(20, seed=1)[0][0].tolist()
    with Engine(model, page_size=4, num_pages=64) as engine:
        engine.generate(prompt, GREEDY)
        model.to(torch.bfloat16)
        (result,) = engine.generate(prompt, GREEDY)
        assert result.metrics.cached_tokens == 0 and engine.store.dtype == torch.bfloat16
    with Engine(model, page_size=4, num_pages=64, prefix_caching=False) as fresh:
        assert fresh.generate(prompt, GREEDY)[0].outputs[0].token_ids == result.outputs[0].token_ids


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_change_between_two_steps(model, through_data):
    prompt = prompts_of(20, seed=1)[0][0].tolist()
    weight = model.get_input_embeddings().weight
    with Engine(model, page_size=4, num_pages=64, check=True) as engine:
        engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), request_id="a")
        for _ in range(4):
            engine.step()
        known = list(engine.core.requests[0].rows[0].output_ids)
        with torch.no_grad():
            (weight.data if through_data else weight).mul_(-1.3)
        while engine.has_work:
            results = engine.step()
        tokens = results[0].outputs[0].token_ids
    with Engine(model, page_size=4, num_pages=64, prefix_caching=False) as fresh:
        rest = SamplingParams(temperature=0.0, max_tokens=60 - len(known), ignore_eos=True)
        assert tokens == known + fresh.generate([*prompt, *known], rest)[0].outputs[0].token_ids


def test_adapters(model, shared):
    peft = pytest.importorskip("peft")
    generate(model, shared)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    seen = []

    def look(name):
        tokens = generate(adapted, shared).tolist()
        assert tokens == plain(adapted, shared), name
        seen.append(str(tokens))

    look("one")
    adapted.set_adapter("two")
    look("two")
    with adapted.disable_adapter():
        look("disabled")
    look("enabled")
    adapted.merge_adapter()
    look("merged")
    adapted.unmerge_adapter()
    adapted.set_adapter("one")
    look("one again")
    assert seen[0] == seen[-1] and len(set(seen)) >= 3


def test_forget(model, shared):
    generate(model, shared)
    engine = engine_of(model)
    assert "tokens on" in str(engine.tree_summary()) and engine.tree_summary().lines
    for limit in (-1, 2.5, "x", True):
        with pytest.raises(ValueError, match="limit="):
            engine.tree_summary(limit)
    engine.forget()
    assert engine.tree_summary().nodes == 0
    engine.check()


def test_calls_with_positions_or_embeddings_of_their_own_stay_apart(model, rows):
    generate(model, rows)
    embeds = model.get_input_embeddings()(rows["input_ids"]) * 1.1
    for call in (
        {"inputs_embeds": embeds},
        {**rows, "num_beams": 2},
        {**rows, "position_ids": torch.arange(6)[None] + 3},
    ):
        cached(model)
        expected = model.generate(**call, max_new_tokens=6)
        assert model.generate(**call, max_new_tokens=6, cache_implementation="paged").tolist() == expected.tolist()
        assert cached(model) == 0
        assert_equal(model, **rows, max_new_tokens=6)


def test_layers_that_slide_share_too(shared):
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = spread(MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=6)))
    for _ in range(2):
        assert generate(model, shared).tolist() == plain(model, shared)
    assert cached(model) > 40


def test_prefixes_go_to_a_file_and_come_back(model, tmp_path):
    prompt = prompts_of(21, seed=1)[0][0].tolist()
    with Engine(model, page_size=4, num_pages=64) as engine:
        wanted = engine.generate(prompt, GREEDY)[0].outputs[0].token_ids
        path = engine.save_prefixes(tmp_path)
    with Engine(model, page_size=4, num_pages=64, check=True) as engine:
        assert engine.load_prefixes(path) == 26 and engine.load_prefixes(path) == 0
        (result,) = engine.generate(prompt, GREEDY)
        assert result.outputs[0].token_ids == wanted and result.metrics.cached_tokens == 20
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        with pytest.raises(ValueError, match="other weights"):
            engine.load_prefixes(path)
        engine.generate(prompt, GREEDY)
    with (
        Engine(model, page_size=4, num_pages=3, prefix_caching=False) as off,
        pytest.raises(ValueError, match="keeps no"),
    ):
        off.save_prefixes(path)


def test_evicted_pages_come_back_from_files(model, tmp_path):
    texts = [prompt[0].tolist() for prompt in prompts_of(60, 61, 62, seed=2)]
    with Engine(model, page_size=4, num_pages=40, check=True, disk_cache=tmp_path) as engine:
        first = [engine.generate(text, GREEDY)[0].outputs[0].token_ids for text in texts]
        assert [engine.generate(text, GREEDY)[0].outputs[0].token_ids for text in texts] == first
        assert engine.stats().restored_tokens > 0 and list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="host_cache_bytes"):
        Engine(model, host_cache_bytes=1 << 20)
