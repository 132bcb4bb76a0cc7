"""Steps with drafts, several in one compiled call: the tokens, the drafts and the bookkeeping of steps one by one."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from state_helpers import raising_behind
from test_contract_interrupts import interrupted_at
from test_speculation import draft_of, requests, tokens

from hf_paged import Engine, SamplingParams, SpeculationConfig
from hf_paged.integrations.few_stepper import FewStepper
from hf_paged.kernels.native import native_ops
from hf_paged.kernels.native_verified import FOLLOWED, MODEL, TEXT, Followed, Rules, TextRow
from hf_paged.plan import PlanRow
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.guide import MARGIN, Ledger, Overhead
from hf_paged.speculation.lookup import NgramIndex, lookup
from hf_paged.speculation.suffix import SURE, SuffixIndex
from hf_paged.speculation.trial import Trial
from hf_paged.speculation.visit import ENDING, KINDS, Step, Visits, verdict_of

pytestmark = pytest.mark.skipif(native_ops() is None, reason="there are no compiled ops")

GREEDY = dict(temperature=0.0)
PARAMS = {
    "greedy": GREEDY,
    "sampled": dict(temperature=1.0, top_p=0.9),
    "filtered": dict(temperature=0.7, top_k=3, min_p=0.05),
    "stops": dict(temperature=0.8, stop_token_ids=(5, 11)),
}


@pytest.fixture(scope="module")
def models():
    model = tiny_llama(vocab_size=23)
    return model, draft_of(model)


@pytest.fixture
def eager(monkeypatch):
    """Drafts seem to cost nothing, so that steps hold as many as they may."""
    monkeypatch.setattr(Trial, "drafts", lambda self, rows, promise=None: True)
    monkeypatch.setattr(Trial, "left", 15)
    monkeypatch.setattr(CostTable, "knows", lambda self, tokens: bool(self))
    monkeypatch.setattr(Ledger, "seconds", lambda self, nodes: 1 + 1e-6 * nodes)


@pytest.fixture
def visits(monkeypatch):
    """Visits that were made, with their plans."""
    seen, verify = [], FewStepper.verify

    def noted(self, plan):
        visit = verify(self, plan)
        if visit is not None:
            seen.append((plan, visit))
        return visit

    monkeypatch.setattr(FewStepper, "verify", noted)
    return seen


def engine_of(model, draft=None, method=None, check=True, **settings):
    speculation = None if method is None else SpeculationConfig(method=method)
    sizes = {"page_size": 4, "num_pages": 200, "max_model_len": 128, **settings}
    draft = draft if method in ("draft", "auto") else None
    return Engine(model, draft_model=draft, speculation=speculation, check=check, **sizes)


def made(visits, source):
    return [each for _, visit in visits for step in visit.steps for each in step if each.source == source]


@pytest.mark.parametrize("params", PARAMS.values(), ids=list(PARAMS))
@pytest.mark.parametrize("method", ["lookup", "draft", "suffix", "auto"])
def test_visits_change_no_token(models, method, params, eager, visits):
    prompts, given = requests(8, **params)
    wanted = [tokens(engine_of(models[0]), [p], [g]) for p, g in zip(prompts, given, strict=True)]
    with engine_of(*models, method) as engine:
        for _ in range(2):
            assert [tokens(engine, [p], [g]) for p, g in zip(prompts, given, strict=True)] == wanted
        stats = engine.speculation_stats()
        assert visits and stats.proposed > 0
        assert engine.stats().pages_free == engine.stats().pages_total
    if method == "draft":
        assert 0 < stats.accepted < stats.proposed
        trees = [each for each in made(visits, MODEL) if each.parents != tuple(range(-1, len(each.parents) - 1))]
        assert trees and any(node != place for each in trees for place, node in enumerate(each.path))


@pytest.mark.parametrize("settings", [{}, {"num_pages": 24, "max_model_len": 80}, {"max_sequences": 3}], ids=str)
@pytest.mark.parametrize("params", PARAMS.values(), ids=list(PARAMS))
@pytest.mark.parametrize("method", ["lookup", "draft", "suffix"])
def test_rows_that_are_drafted_for_together(models, method, params, settings, eager, visits):
    prompts, given = requests(10, **params)
    prompts[1] = prompts[1][::-1]  # rows that share a page go step by step
    wanted = tokens(engine_of(models[0]), prompts, given)
    with engine_of(*models, method, **settings) as engine:
        for _ in range(2 if method == "suffix" else 1):
            assert tokens(engine, prompts, given) == wanted
        assert method == "suffix" or any(len(plan.work) > 1 for plan, _ in visits)
        assert engine.stats().pages_free == engine.stats().pages_total
    if method == "draft":
        together = [step for plan, visit in visits for step in visit.steps if len(plan.work) > 1]
        assert any(sum(bool(each.tokens) for each in step) > 1 for step in together)


@pytest.mark.parametrize("method", ["lookup", "draft"])
def test_without_anything_made_to_pay(models, method, visits):
    """Costs as measured, trials as they come."""
    prompts, _ = requests(4)
    given = [SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)] * 4
    wanted = tokens(engine_of(models[0]), prompts, given)
    with engine_of(*models, method) as engine:
        for _ in range(3):
            assert [tokens(engine, [p], [given[0]])[0] for p in prompts] == wanted
    assert visits


def test_visits_that_do_not_pay_are_followed_by_rests(models):
    """Whatever was found in them: by what bursts of as many rows take."""
    with engine_of(models[0], method="lookup") as engine:
        visits = Visits(engine.speculator, CostTable())
    plan, found, steps = SimpleNamespace(speculator=visits.speculator), [(None, None)], 10
    drafted, plain = ([Step(8, tokens, found if tokens > 8 else [])] * steps for tokens in (12, 8))
    rests = [visits.rest(made, 1.0, plan) for made in (drafted, plain, plain, drafted)]
    assert rests == [0, 1, 2, 0]  # what bursts take is not known yet
    for _ in range(8):
        visits.bursts.note(8, 0.001)
    rests = [visits.rest(drafted, seconds * steps, plan) for seconds in (0.0014, 0.0016, 0.0016, *[0.0016] * 4, 0.0014)]
    assert rests == [0, 1, 2, 3, 4, 4, 4, 0]
    assert visits.rest(plain, 0.0009 * steps, plan) == 1


@pytest.mark.parametrize("method", ["lookup", "draft"])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_row_that_ends_does_not_end_the_others_visit(models, method, waiting, eager, visits):
    """Unless another waits for its place."""
    prompts = [[3 + row, 4, 5] * 4 for row in range(8 + waiting)]
    lengths = [12, 100, 90, 100, 80, 100, 100, 100, 40][: len(prompts)]
    given = [SamplingParams(max_tokens=n, ignore_eos=True, seed=n, **GREEDY) for n in lengths]
    wanted = tokens(engine_of(models[0]), prompts, given)
    with engine_of(*models, method, max_sequences=8) as engine:
        assert tokens(engine, prompts, given) == wanted
        assert engine.stats().pages_free == engine.stats().pages_total
    outlived = {plan.rules.ending for plan, visit in visits for step in visit.steps if not all(e.drawn for e in step)}
    assert outlived and 0 not in outlived
    assert waiting == any(plan.rules.ending == 0 for plan, _ in visits if len(plan.work) >= ENDING)


def stored(store, sequence, count):
    """Keys and values of the first `count` tokens, a layer after another: `[layers, 2, heads, count, dim]`."""
    pages = torch.tensor(sequence.pages)
    parts = [(store.keys[i], store.values[i]) for i in range(len(store.keys))]
    return torch.stack(
        [torch.stack([p[pages].transpose(0, 1).flatten(1, 2)[:, :count] for p in pair]) for pair in parts]
    )


def computed(model, ids):
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("params", [GREEDY, PARAMS["sampled"]], ids=["greedy", "sampled"])
def test_what_is_stored_is_what_the_tokens_have(models, params, rows, eager, visits):
    """Also of branches that were taken, and for the draft model, of as many tokens as it is said to know."""
    model, draft = models
    with engine_of(model, draft, "draft") as engine:
        for seed in range(rows):
            engine.submit([3, 4 + seed, 5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True, seed=seed, **params))
        drafter, unknown = engine.speculator.drafter, []
        while engine.has_work:
            engine.step()
            for row in engine.core.roster.running:
                sequence, ids = row.sequence, row.tokens[: row.sequence.computed]
                ours, own = stored(engine.store, sequence, len(ids)), computed(model, ids)
                torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-4)
                count = drafter.known(PlanRow(row, sequence, 1, 1))
                unknown.append(len(ids) - count)
                if count:
                    ours, own = stored(drafter.store, sequence, count), computed(draft, ids[:count])
                    torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-4)
    assert len(visits) > 2 and min(unknown) <= 1
    assert any(len(plan.work) == rows for plan, _ in visits)


def rules_of(**given):
    usual = dict(
        ngram=0,
        deepest=8,
        usual=8,
        sure=SURE,
        chain=0,
        width=1,
        kinds=KINDS,
        margin=MARGIN,
        row_decay=0.9,
        row_trust=4.0,
    )
    seconds = given.pop("seconds", 1 + 1e-6 * np.arange(41))
    looked = given.pop("looked", np.full((3, 7), 0.9, np.float32))
    return Rules(**{**usual, **given}).with_tables(
        np.stack([looked, looked]), np.full((3, 3 * KINDS), 0.9, np.float32), seconds, np.ones(2)
    )


def looked_up(models, text, rules, records=((0.0, 0.0),) * 3, left=60, followed=None):
    """What one step of a row with this text verifies."""
    with engine_of(models[0], check=False) as engine:
        room = np.zeros(len(text) + 100, np.int64)
        room[: len(text)] = text
        row = TextRow(room, len(text), 120, left, (), len(text), records, 1.0, followed)
        few, stepper = engine.forward.few_model(), engine.core.stepper
        parameters = [np.zeros(1, np.float32), np.full(1, -1, np.float32), np.zeros(1, np.float32)]
        parameters += [np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, len(text))]
        visit = stepper.verified((few, None), [row], rules, parameters, np.arange(1, 31)[None], 1)
        return visit.steps[0][0]


def test_what_is_looked_up_is_what_the_index_finds(models):
    rng, found = np.random.default_rng(0), 0
    for length in (1, 2, 3, 5, 9, 20, 50, 50, 50, 50):
        text = rng.integers(0, 3, length).tolist()
        for ngram in (1, 3, 16):
            wanted = lookup(NgramIndex(ngram), text, 30, usual=8)
            got = looked_up(models, text, rules_of(ngram=ngram, deepest=30), left=31)
            assert got.tokens == (wanted.tokens if wanted is not None else ())
            if wanted is not None:
                found += 1
                assert (got.kinds, got.parents, got.source) == (wanted.kinds, wanted.parents, TEXT)
    assert found > 20


def test_what_comes_next_in_a_text_that_is_repeated(models):
    rng, index, found = np.random.default_rng(0), SuffixIndex(1 << 10), []
    for length, common in ((60, 40), (60, 11), (60, 12), (30, 16), (60, 59)):
        other = rng.integers(0, 23, length).tolist()
        text = rng.integers(0, 23, 5).tolist() + other[max(20 - common, 0) : 20]
        index.update(index.open(other, None))
        entry = index.open(text, None)
        repeated, wanted = index.followed(entry), index.propose(entry, 30, 1, usual=8)
        found.append(repeated is not None)
        for begin in (0, 3 if common < 17 else 0):  # agreement is told as far as there are tokens
            followed = Followed(np.array(other[begin:]), begin, 20 - len(text))
            got = looked_up(models, text, rules_of(deepest=30), left=31, followed=followed)
            assert got.tokens == (wanted.tokens if found[-1] else ())
            if found[-1]:
                assert (repeated[0].tokens, repeated[1]) == (other, 20)
                assert (got.parents, got.source) == (wanted.parents, FOLLOWED)
                # What is learned is what is asked: kinds are those of the index.
                assert verdict_of(SimpleNamespace(model=None), got, 1, False).proposal.kinds == wanted.kinds
        for begin, behind in ((20, 0), (0, 10), (0, 60)):  # what is told does not reach so far, or is not the place
            followed = Followed(np.array(other[begin:]), begin, behind + 20 - len(text))
            assert not looked_up(models, text, rules_of(deepest=30), followed=followed).tokens
    assert found == [True, False, True, True, True]


def test_a_row_that_repeats_itself(models):
    """Behind its last token it goes on with itself."""
    text = list(range(10)) * 2
    got = looked_up(models, text, rules_of(deepest=25, usual=25, sure=10), followed=Followed(None, 0, -10))
    assert got.tokens == tuple(range(10)) * 2 + (0, 1, 2, 3, 4) and got.source == FOLLOWED
    assert not looked_up(models, text, rules_of(sure=11), followed=Followed(None, 0, -10)).tokens
    # What it repeats goes before what is looked up.
    other = Followed(np.array(text + [20, 21]), 0, 0)
    assert looked_up(models, text, rules_of(ngram=3, sure=10), followed=other).tokens[:2] == (20, 21)
    assert looked_up(models, text, rules_of(ngram=3, sure=40), followed=other).source == TEXT


@pytest.mark.parametrize("method", ["suffix", "auto"])
def test_texts_that_are_known_are_followed_at_visits(models, method, eager, visits):
    """Without a draft model, though there is one. Where a row departs from what it repeated, it is looked at anew."""
    prompts = [[2 + i, 5, 7, 1 + i % 4, 9, 3, *range(i, 18)] for i in range(6)]
    given = [SamplingParams(max_tokens=60, ignore_eos=True, **GREEDY)] * 6
    with engine_of(*models, method) as engine:
        wanted = tokens(engine, prompts, given)
        visits.clear()
        assert tokens(engine, prompts, given) == wanted == tokens(engine_of(models[0]), prompts, given)
        assert made(visits, FOLLOWED) and not made(visits, MODEL)
        assert all(plan.model is None for plan, _ in visits)
        visits.clear()
        others = [SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.05, seed=i) for i in range(6)]
        assert tokens(engine, prompts, others) == tokens(engine_of(models[0]), prompts, others)
        drafts = made(visits, FOLLOWED)
        assert any(len(each.path) < len(each.tokens) for each in drafts)
        record = engine.speculation_stats().proposers["suffix"]
        assert 0 < record.accepted < record.proposed
        assert engine.stats().pages_free == engine.stats().pages_total


def test_what_is_followed_is_not_told_to_others(models, eager, visits):
    """Of another salt, or of a request that shares nothing."""
    prompt, given = [3, 5, 7, 9, 1, 2, *range(12)], dict(max_tokens=40, ignore_eos=True, **GREEDY)
    with engine_of(models[0], None, "suffix") as engine:
        for params in (dict(cache_salt="a"), dict(cache_salt="b"), dict(prefix_caching=False)):
            engine.generate([prompt], SamplingParams(**given, **params))
            texts = [row.followed for plan, _ in visits for row in plan.rows]
            assert all(text is None or text.tokens is None for text in texts)
        engine.generate([prompt], SamplingParams(**given, cache_salt="b"))
        assert any(
            row.followed is not None and row.followed.tokens is not None for plan, _ in visits for row in plan.rows
        )


def test_how_many_are_verified_is_what_the_ledger_says(models):
    rng, counts = np.random.default_rng(1), set()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 1, 2, 3]
    for _ in range(30):
        seconds = 1 + np.cumsum(rng.exponential(0.12, 41))
        looked = np.tile(rng.uniform(0.5, 0.98, (3, 1)).astype(np.float32), (1, 7))
        got = looked_up(models, text, rules_of(ngram=3, deepest=14, usual=14, seconds=seconds, looked=looked))
        ledger = Ledger(CostTable(), Overhead(), 1, 1)
        ledger._seconds = dict(enumerate(seconds.tolist()))
        odds = [float(looked[min(depth, 2), 0]) for depth in range(14)]
        assert len(got.tokens) == ledger.best(np.cumprod(odds).tolist())[1]
        counts.add(len(got.tokens))
    assert len(counts) > 3


def test_nothing_is_looked_up_that_cannot_pay(models):
    text = [1, 2, 3, 4, 1, 2]
    assert looked_up(models, text, rules_of(ngram=3)).tokens
    assert not looked_up(models, text, rules_of(ngram=3, cheapest=0.95)).tokens
    # Of a row whose drafts were taken less often than expected less is expected.
    assert not looked_up(models, text, rules_of(ngram=3, cheapest=0.8), ((0.0, 4.0), (0.0, 0.0))).tokens
    assert not looked_up(models, text, rules_of(ngram=3), left=1).tokens


def test_what_was_learned_is_what_verdicts_say(models, eager, visits):
    """What a second visit is told of a row is what the first one came to."""
    with engine_of(*models, "draft") as engine:
        engine.submit([3, 4, 5, 6, 7], SamplingParams(max_tokens=110, ignore_eos=True, **GREEDY))
        seen = []
        while engine.has_work:
            engine.step()
            if visits and not seen:
                row = next(iter(engine.core.roster.running))
                seen = [row.drafting.record("draft").taken, row.drafting.record("draft").expected]
    assert len(visits) > 3 and visits[1][0].rows[0].records[1] == tuple(seen) != (0.0, 0.0)
    assert engine.speculation_stats().proposers["draft"].proposed == sum(len(e.tokens) for e in made(visits, MODEL))


def test_stops_in_the_middle_of_what_was_made(models, tokenizer, eager, visits):
    """A stop string or a criterion is not known to the compiled steps: what they made behind it is thrown away."""
    model = tiny_llama(vocab_size=len(tokenizer))
    text = "one two one two one two"
    for method in ("lookup", "draft"):
        with (
            engine_of(model, tokenizer=tokenizer) as plain,
            engine_of(model, copy.deepcopy(model), method, tokenizer=tokenizer) as engine,
        ):
            whole = plain.generate([text], SamplingParams(max_tokens=80, ignore_eos=True, **GREEDY))[0].outputs[0].text
            for at in (3, len(whole) // 2, len(whole) - 8):
                params = SamplingParams(max_tokens=80, ignore_eos=True, stop=[whole[at : at + 3]], **GREEDY)
                wanted, got = (each.generate([text], params)[0].outputs[0] for each in (plain, engine))
                assert (got.token_ids, got.text, got.finish_reason) == (wanted.token_ids, wanted.text, "stop")
            engine.check()
            assert engine.stats().pages_free == engine.stats().pages_total
    assert visits


def test_a_target_whose_numbers_are_not_finite(models, eager, visits):
    """The step is made anew, by itself: the request fails where it would without drafts."""
    broken = copy.deepcopy(models[0])
    with torch.no_grad():
        broken.model.embed_tokens.weight[20:] = torch.nan
    params = [SamplingParams(temperature=1.0, max_tokens=60, seed=i, ignore_eos=True) for i in range(5)]
    prompts = [[3, 4, 5 + i] for i in range(5)]
    with engine_of(broken, prefix_caching=False) as plain, engine_of(broken, models[1], "draft") as engine:
        for prompt, given in zip(prompts, params, strict=True):
            wanted, got = (each.generate([prompt], given)[0] for each in (plain, engine))
            assert str(got.error) == str(wanted.error)
            assert got.outputs[0].token_ids == wanted.outputs[0].token_ids
        engine.check()
        assert any(torch.isfinite(part).all() for part in engine.store.keys)
        assert engine.stats().pages_free == engine.stats().pages_total
    assert any(visit.spoilt for _, visit in visits)


def test_logits_of_minus_infinity_are_no_fault(models, eager, visits):
    model = copy.deepcopy(models[0])
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 23, bias=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(models[0].lm_head.weight)
        model.lm_head.bias.zero_()[5] = -torch.inf
    prompt, given = [[3, 4, 3, 4]], [SamplingParams(max_tokens=60, ignore_eos=True, **GREEDY)]
    wanted = tokens(engine_of(model), prompt, given)
    with engine_of(model, models[1], "draft") as engine:
        assert tokens(engine, prompt, given) == wanted
    assert visits and not any(visit.spoilt for _, visit in visits)


def test_a_draft_model_that_gives_nan_is_the_end_of_drafting(models, eager, visits):
    model, broken = models[0], copy.deepcopy(models[1])
    broken.model.norm.weight.data[3] = torch.nan
    prompts, given = requests(4, **GREEDY)
    wanted = [tokens(engine_of(model), [p], [g]) for p, g in zip(prompts, given, strict=True)]
    with engine_of(model, broken, "draft") as engine:
        assert [tokens(engine, [p], [g]) for p, g in zip(prompts, given, strict=True)] == wanted
        assert engine.speculator.drafter.failed


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_a_visit_takes_nothing(models, eager, error):
    prompt, given = [3, 4, 5], SamplingParams(max_tokens=60, ignore_eos=True, **GREEDY)
    with engine_of(*models, "draft") as engine:
        wanted = tokens(engine, [prompt], [given])
        engine.core.stepper.verified = raising_behind(engine.core.stepper.verified, [2], error)
        with pytest.raises(error):
            engine.generate([prompt], given)
        engine.check()
        assert not engine.core.busy and engine.stats().pages_free == engine.stats().pages_total
        assert tokens(engine, [prompt], [given]) == wanted


def test_pages_that_others_wrote_hold_no_drafts(models, eager, visits):
    """A page that fills up is given up for one with the same tokens, of which the draft model may know nothing."""
    model, prompt, given = models[0], [3, 4, 5, 6], SamplingParams(max_tokens=100, ignore_eos=True, **GREEDY)
    twin = copy.deepcopy(model)
    with engine_of(model, twin, "draft") as engine:
        speculator, engine.speculator = engine.speculator, None
        wanted = tokens(engine, [prompt], [given])  # into the prefix cache
        engine.speculator = speculator
        drafter = speculator.drafter
        engine.submit([*prompt], given)
        while engine.has_work:
            engine.step()
            for row in engine.core.roster.running:
                count = drafter.known(PlanRow(row, row.sequence, 1, 1))
                if count:
                    ours, own = stored(drafter.store, row.sequence, count), computed(twin, row.tokens[:count])
                    torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-4)
        assert tokens(engine, [prompt], [given]) == wanted
    assert visits


def test_a_draft_model_that_falls_behind_is_not_asked(models, eager, visits):
    """Rows whose texts draft long runs leave it behind, by more lines than a step has."""
    model = models[0]
    with torch.no_grad():
        rows = [[7, 8, 9, 10] * 6, [5, 6] * 12, [3, 4, 5, 6, 7] * 5]
    given = [SamplingParams(max_tokens=100, seed=i, ignore_eos=True, temperature=0.3) for i in range(3)]
    wanted = tokens(engine_of(model, num_pages=400), rows, given)
    with engine_of(*models, "auto", num_pages=400) as engine:
        engine.speculator.suffixes = engine.speculator.texts.suffixes = None
        engine.speculator.texts.due = lambda rows, step: []
        engine.speculator.texts.purse = -1.0
        for _ in range(3):
            assert tokens(engine, rows, given) == wanted
    assert made(visits, TEXT) and made(visits, MODEL)


def test_a_draft_model_that_is_gone_is_freed(models, eager, visits):
    model, draft = models[0], copy.deepcopy(models[1])
    with engine_of(model) as engine:
        speculator = engine.speculator_for(SpeculationConfig(method="draft"), draft)
        engine.speculator = speculator
        tokens(engine, [[3, 4, 5]], [SamplingParams(max_tokens=60, ignore_eos=True, **GREEDY)])
        store = weakref.ref(speculator.drafter.store)
        engine.speculator = None
        del draft, speculator
        visits.clear()
        gc.collect()
        tokens(engine, [[3, 4, 5]], [SamplingParams(max_tokens=4, **GREEDY)])
        gc.collect()
        assert store() is None


@pytest.mark.parametrize("method", ["draft", "lookup"])
def test_interrupts_anywhere(models, method, eager, visits):
    prompts, chance, last = [[3, 4, 5, 3, 4], [7, 8, 7, 8, 7]], random.Random(0), 1
    given = [SamplingParams(max_tokens=30, seed=i, ignore_eos=True) for i in range(2)]
    with engine_of(*models, method) as engine:
        wanted = tokens(engine, prompts, given)
        while interrupted_at(last, lambda: engine.generate(prompts, given)):
            last *= 2
        for count in [chance.randrange(1, last) for _ in range(40)]:
            interrupted_at(count, lambda: engine.generate(prompts, given))
            engine.check()
            assert not engine.core.busy and engine.stats().pages_free == engine.stats().pages_total, count
            if count % 4 == 0:
                assert tokens(engine, prompts, given) == wanted, count
        assert tokens(engine, prompts, given) == wanted
    assert visits


def test_weights_of_a_draft_model_that_change_between_visits(models, eager, visits):
    model, draft = models[0], copy.deepcopy(models[1])
    prompt, given = [3, 4, 5], SamplingParams(max_tokens=90, ignore_eos=True, **GREEDY)
    wanted = tokens(engine_of(model), [prompt], [given])
    with engine_of(model, draft, "draft") as engine:
        assert tokens(engine, [prompt], [given]) == wanted
        draft.load_state_dict(tiny_llama(seed=5, vocab_size=23).state_dict())
        assert tokens(engine, [prompt], [given]) == wanted
        draft.load_state_dict(model.state_dict())
        before = engine.speculation_stats()
        assert tokens(engine, [prompt], [given]) == wanted
        now = engine.speculation_stats()
        assert now.accepted - before.accepted > 60
