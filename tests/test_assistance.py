"""What a call says of drafting, and what its assistant says where the call does not."""

from __future__ import annotations

import logging

import pytest
from conftest import left_padded, prompts_of, tiny_llama
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged.integrations.assistance import asked
from hf_paged.integrations.registry import REGISTRY


@pytest.fixture
def enabled():
    hf_paged.enable(check=True)
    yield
    hf_paged.disable()


def test_what_the_call_does_not_say_the_assistant_does():
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    draft = LlamaForCausalLM(LlamaConfig(**sizes))
    usual = asked(GenerationConfig(), draft)
    draft.generation_config.num_assistant_tokens = 1
    draft.generation_config.assistant_confidence_threshold = 0.25
    found = asked(GenerationConfig(), draft)
    assert (found.max_draft_tokens, found.confidence_threshold) == (1, 0.25)
    found = asked(GenerationConfig(num_assistant_tokens=3), draft)
    assert (found.max_draft_tokens, found.confidence_threshold) == (3, 0.25)
    assert usual.max_draft_tokens != 1 and not usual.confidence_threshold


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_lookup_num_tokens", 0),
        ("prompt_lookup_num_tokens", 2.5),
        ("assistant_early_exit", True),
        ("assistant_early_exit", 0),
        ("num_assistant_tokens", -1),
        ("num_assistant_tokens", "5"),
        ("max_matching_ngram_size", 0),
        ("assistant_confidence_threshold", 1.5),
        ("assistant_confidence_threshold", "high"),
        ("assistant_ensemble_weight", 0.5),
    ],
)
def test_what_is_refused_is_called_as_the_caller_calls_it(name, value):
    config = GenerationConfig()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"GenerationConfig\.{name}={value!r} is not allowed"):
        asked(config, tiny_llama())


def test_first_layers_go_before_an_assistant_as_in_transformers():
    config = GenerationConfig(assistant_early_exit=1, num_assistant_tokens=100)
    found = asked(config, tiny_llama())
    assert (found.method, found.early_exit, found.max_draft_tokens) == ("layer_skip", 1, 64)


def test_an_assistant_that_changes_what_is_drawn_is_left_to_transformers(enabled, caplog):
    model, draft = tiny_llama(vocab_size=23), tiny_llama(vocab_size=23, num_hidden_layers=1)
    batch = left_padded(prompts_of(7, vocab_size=23))
    settings = dict(max_new_tokens=8, assistant_model=draft, do_sample=True)
    model.generation_config.assistant_ensemble_weight = 0.5
    with caplog.at_level(logging.INFO, "hf_paged"):
        assert model.generate(**batch, **settings, cache_implementation="paged").shape == (1, 15)
    assert "assistant_ensemble_weight" in caplog.text


def test_both_doors_at_once_take_the_arguments_of_both(enabled):
    model, draft = tiny_llama(vocab_size=23), tiny_llama(vocab_size=23, num_hidden_layers=1)
    batch = left_padded(prompts_of(5, 9, vocab_size=23))
    plain = model.generate(**batch, max_new_tokens=15)
    ours = {"draft_model": draft, "engine_config": {"page_size": 4}, "cache_implementation": "paged"}
    ours["custom_generate"] = hf_paged.generate
    assert model.generate(**batch, max_new_tokens=15, **ours).tolist() == plain.tolist()
    engine = REGISTRY.find(model)
    assert engine.speculation_stats().proposed and engine.config.page_size == 4
    with pytest.raises(ValueError, match="draft_model and assistant_model are both given"):
        model.generate(**batch, max_new_tokens=15, **ours, assistant_model=draft)
