"""A draft model's forwards over a few lines in one compiled call: the drafts are those of forwards by plans."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_llama
from test_speculation import draft_of, engine_of, requests, tokens

from hf_paged import Engine, SpeculationConfig
from hf_paged.kernels.native import native_ops
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.few import FewDrafts
from hf_paged.speculation.guide import Guide
from hf_paged.speculation.trial import Trial

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


def adaptive(model, draft, monkeypatch, least=0.0, **settings):
    """An engine that drafts at every step what it may, as if it were known to pay."""
    monkeypatch.setattr(Trial, "drafts", lambda self, rows, promise=None: True)
    monkeypatch.setattr(CostTable, "knows", lambda self, tokens: bool(self))
    monkeypatch.setattr(Guide, "least_of_chain", lambda self: least)
    monkeypatch.setattr(Guide, "least", lambda self: 0.0)
    speculation = SpeculationConfig(method="draft", **settings)
    sizes = {"page_size": 4, "num_pages": 200, "max_model_len": 128}
    engine = Engine(model, draft_model=draft, speculation=speculation, check=True, **sizes)
    engine.core.stepper = None  # step by step: see test_visits.py
    return engine


def test_one_row_alone_gets_a_chain_and_what_stands_beside_it(models, monkeypatch):
    model, draft = models
    made = []
    with adaptive(model, draft, monkeypatch) as engine:
        drafter = engine.speculator.drafter
        before = drafter._proposal

        def note(tree):
            made.append((list(tree.planned.row.tokens), before(tree)))
            return made[-1][1]

        monkeypatch.setattr(drafter, "_proposal", note)
        (prompt, *_), (params, *_) = requests(count=2, temperature=0)
        got = tokens(engine, [prompt], [params])
    assert got == tokens(Engine(model, num_pages=200), [prompt], [params]) and len(made) > 3
    for ids, proposal in made:
        depth = len({parent for parent in proposal.parents})
        assert proposal.parents[:depth] == tuple(range(-1, depth - 1))
        chain = torch.tensor([[*ids, *proposal.tokens[:depth]]])
        with torch.no_grad():
            best = draft(chain).logits[0, len(ids) - 1 :].topk(4).indices.tolist()
        assert list(proposal.tokens[:depth]) == [best[at][0] for at in range(depth)]
        for token, parent in list(zip(proposal.tokens, proposal.parents, strict=True))[depth:]:
            assert token in best[parent + 1][1:]
    assert max(len({*proposal.parents}) for _, proposal in made) == 8  # as deep as a draft model drafts


@pytest.mark.parametrize("params", PARAMS.values(), ids=list(PARAMS))
def test_chains_change_no_token(models, params, monkeypatch):
    prompts, given = requests(count=3, **params)
    wanted = [tokens(Engine(models[0], num_pages=200), [p], [g]) for p, g in zip(prompts, given, strict=True)]
    with adaptive(*models, monkeypatch) as engine:
        assert [tokens(engine, [p], [g]) for p, g in zip(prompts, given, strict=True)] == wanted
        stats = engine.speculation_stats()
        assert 0 < stats.accepted < stats.proposed


def test_a_chain_ends_where_nothing_behind_it_can_pay(models, monkeypatch):
    (prompt, *_), (params, *_) = requests(count=2, temperature=0)
    with adaptive(*models, monkeypatch, least=2.0, tree_width=1) as engine:
        tokens(engine, [prompt], [params])
        stats = engine.speculation_stats().proposers["draft"]
        assert stats.proposed == stats.proposals > 0


def test_a_chain_that_is_not_finite_is_the_end_of_drafting(models, monkeypatch):
    model, broken = models[0], copy.deepcopy(models[1])
    broken.model.norm.weight.data[3] = torch.nan
    (prompt, *_), (params, *_) = requests(count=2, temperature=0)
    with adaptive(model, broken, monkeypatch) as engine:
        assert tokens(engine, [prompt], [params]) == tokens(Engine(model, num_pages=200), [prompt], [params])
        assert engine.speculator.drafter.failed


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
