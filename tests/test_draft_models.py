"""Draft models that change in place, that are mended, that take fewer positions than the target, or cannot draft."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import prompts_of, spread, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import hf_paged
from hf_paged import Engine, SamplingParams, SpeculationConfig
from hf_paged.speculation.drafter import CLOSELY

PROMPTS = [prompt[0].tolist() for prompt in prompts_of(9, 21, 14, vocab_size=23)]
ALWAYS = SpeculationConfig(method="draft", adaptive=False, max_draft_tokens=4, tree_width=1)


def engine_of(model, draft=None, speculation=ALWAYS, **settings):
    sizes = {"page_size": 4, "num_pages": 200, "max_model_len": 120} | settings
    return Engine(model, draft_model=draft, speculation=speculation if draft is not None else None, check=True, **sizes)


def tokens(engine, count=24, prompts=PROMPTS):
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
    assert [output.error for output in outputs] == [None] * len(outputs)
    engine.check()
    return [output.outputs[0].token_ids for output in outputs]


def drafted(engine, **given):
    """Tokens of a call, and the drafts that were made and taken in it."""
    before = engine.speculation_stats()
    found = tokens(engine, **given)
    after = engine.speculation_stats()
    return found, after.proposed - before.proposed, after.accepted - before.accepted


def load(draft, other):
    draft.load_state_dict(other.state_dict())


def through_data(draft, other):
    for mine, its in zip(draft.parameters(), other.parameters(), strict=True):
        mine.data.copy_(its.data)


@pytest.mark.parametrize("change", [load, through_data])
@pytest.mark.parametrize("packed", [False, True])
def test_a_draft_model_that_changes_in_place_keeps_nothing_of_what_it_was(change, packed):
    model = tiny_llama(vocab_size=23)
    draft = tiny_llama(vocab_size=23, seed=5)
    with engine_of(model, draft, pack_weights=packed) as engine:
        wanted = tokens(engine)
        change(draft, model)
        found, proposed, accepted = drafted(engine)  # prompts are cached: of the draft model, too, were it the same
        assert found == wanted and proposed == accepted > 0


def test_a_draft_model_is_looked_at_closely_now_and_then(monkeypatch):
    model = tiny_llama(vocab_size=23)
    with engine_of(model, tiny_llama(vocab_size=23, seed=5)) as engine:
        tokens(engine, 3)
        looks, forward = [], engine.speculator.drafter.forward
        monkeypatch.setattr(forward, "refresh", lambda: looks.append(1))
        for _ in range(2 * CLOSELY):
            tokens(engine, 3, [[5, 6, 7]])
        assert len(looks) == 2
        engine.forget()
        tokens(engine, 3)
        assert len(looks) == 3


def test_what_drafts_of_another_model_are_worth_is_found_out_anew():
    model = tiny_llama(vocab_size=23)
    draft = tiny_llama(vocab_size=23, seed=5)
    with engine_of(model, draft, SpeculationConfig(method="draft")) as engine:
        tokens(engine, 90)
        (speculator,) = engine.core.drafting.speculators.values()
        before, known = speculator.trial, speculator.acceptance.any_odds("draft", 1)
        tokens(engine, 2)
        assert speculator.trial is before
        load(draft, model)
        tokens(engine, 90)
        assert speculator.trial is not before and speculator.acceptance.any_odds("draft", 1) > known


def test_a_draft_model_that_was_mended_drafts_again(caplog):
    model = tiny_llama(vocab_size=23)
    draft = copy.deepcopy(model)
    with engine_of(model, draft) as engine, caplog.at_level(logging.WARNING, "hf_paged"):
        wanted = tokens(engine)
        torch.nn.init.constant_(draft.lm_head.weight, float("nan"))
        assert tokens(engine) == wanted and "nothing more is drafted" in caplog.text
        assert drafted(engine) == (wanted, 0, 0)
        load(draft, model)
        found, proposed, accepted = drafted(engine)
        assert found == wanted and proposed == accepted > 0


@pytest.mark.parametrize("speculation", [ALWAYS, SpeculationConfig(method="draft", tree_width=3, adaptive=False), None])
def test_rows_too_long_for_the_draft_model_alone_get_no_drafts(speculation, caplog):
    model = tiny_llama(vocab_size=23)
    sizes = dict(vocab_size=23, n_positions=32, n_embd=32, n_layer=1, n_head=2, eos_token_id=None)
    draft = spread(GPT2LMHeadModel(GPT2Config(**sizes)))
    wanted = tokens(engine_of(model), 60)
    with engine_of(model, draft, speculation or SpeculationConfig(method="auto")) as engine:
        with caplog.at_level(logging.WARNING, "hf_paged"):
            assert tokens(engine, 60) == wanted
            assert tokens(engine, 60) == wanted
        assert "nothing more is drafted" not in caplog.text
        if speculation is not None:
            assert drafted(engine, count=9, prompts=[[5, 6, 7]])[1] > 0


def test_a_draft_model_is_named_that_cannot_draft(caplog):
    model = tiny_llama(vocab_size=23)
    sizes = dict(vocab_size=23, hidden_size=8, num_hidden_layers=1, state_size=4)
    draft = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="draft_model=MambaForCausalLM cannot draft: "):
        engine_of(model, draft)
    hf_paged.enable()
    try:
        ids = torch.tensor([PROMPTS[0]])
        plain = model.generate(ids, max_new_tokens=5)
        with caplog.at_level(logging.WARNING, "hf_paged"):
            ours = model.generate(ids, max_new_tokens=5, assistant_model=draft, cache_implementation="paged")
    finally:
        hf_paged.disable()
    assert ours.tolist() == plain.tolist() and "nothing is drafted: draft_model=MambaForCausalLM" in caplog.text
