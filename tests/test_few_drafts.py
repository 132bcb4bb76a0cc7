"""A draft model's forwards over a few lines in one compiled call: the drafts are those of forwards by plans."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from test_speculation import draft_of, engine_of, requests, tokens

from hf_paged.kernels.native import native_ops
from hf_paged.speculation.few import FewDrafts

pytestmark = pytest.mark.skipif(native_ops() is None, reason="there are no compiled ops")

PARAMS = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=1.0, top_p=0.9),
    "filtered": dict(temperature=0.7, top_k=3, min_p=0.05),
    "several": dict(temperature=1.0, n=3),
}


@pytest.fixture(scope="module")
def models():
    model = tiny_llama(vocab_size=23)
    return model, draft_of(model)


def drafted(models, name, params, monkeypatch, few=True, **settings):
    """Tokens of some requests, all proposals, and the numbers of lines that the compiled op was given."""
    made, lines = [], []
    with engine_of(*models, name, **settings) as engine, monkeypatch.context() as patch:
        drafter = engine.speculator.drafter
        before, chosen = drafter._proposal, FewDrafts._chosen

        def note(tree):
            made.append(before(tree))
            return made[-1]

        def count(self, of_tree, *rest):
            lines.append(len(of_tree))
            return chosen(self, of_tree, *rest)

        patch.setattr(drafter, "_proposal", note)
        patch.setattr(FewDrafts, "_chosen", count)
        if not few:
            patch.setattr(type(drafter.forward), "few_model", lambda self: None)
        return tokens(engine, *requests(count=3, **params)), made, lines


@pytest.mark.parametrize("params", PARAMS.values(), ids=list(PARAMS))
@pytest.mark.parametrize("name", ["draft chain", "draft tree", "layer skip"])
def test_drafts_are_those_of_plans(models, name, params, monkeypatch):
    whole, made, lines = drafted(models, name, params, monkeypatch)
    apart, planned, none = drafted(models, name, params, monkeypatch, few=False)
    assert whole == apart and made == planned
    assert lines and not none


def test_rows_that_want_more_take_plans(models, monkeypatch):
    _, made, lines = drafted(models, "draft chain", dict(temperature=0, repetition_penalty=1.3), monkeypatch)
    assert made and not lines


def test_models_that_slide_take_plans_once_texts_are_long(monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    config = MistralConfig(vocab_size=23, num_hidden_layers=2, sliding_window=80, max_position_embeddings=256, **sizes)
    model = MistralForCausalLM(config).eval()
    models = model, draft_of(model)
    whole, made, lines = drafted(models, "draft chain", PARAMS["greedy"], monkeypatch)
    apart, planned, _ = drafted(models, "draft chain", PARAMS["greedy"], monkeypatch, few=False)
    assert whole == apart and made == planned
    assert 0 < len(lines) < len(made)


def test_more_lines_than_the_op_takes(models, monkeypatch):
    """And steps that have fewer again."""
    whole, made, lines = drafted(models, "draft tree", PARAMS["greedy"], monkeypatch, max_batch_tokens=8)
    apart, planned, _ = drafted(models, "draft tree", PARAMS["greedy"], monkeypatch, few=False, max_batch_tokens=8)
    assert whole == apart and made == planned
    assert lines and max(lines) <= 8


def test_numbers_that_are_none_end_drafting(models, caplog):
    model, draft = models
    broken = draft_of(model)
    broken.lm_head.weight.data[3] = torch.nan
    with engine_of(model, broken, "draft chain") as engine:
        given = requests(count=2, temperature=0)
        with engine_of(model) as plain:
            assert tokens(engine, *given) == tokens(plain, *given)
        assert engine.speculator.drafter.failed and "NaN" in caplog.text
