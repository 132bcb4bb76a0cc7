"""Speculation changes no token: any drafter, chains and trees, any batch, processors, stops, faults."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import left_padded, prompts_of, tiny_llama
from transformers import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

import hf_paged
from hf_paged import Engine, SamplingParams, SpeculationConfig
from hf_paged.integrations.registry import REGISTRY

METHODS = {
    "lookup": dict(method="lookup"),
    "suffix chain": dict(method="suffix", tree_width=1),
    "suffix tree": dict(method="suffix", tree_width=4),
    "draft chain": dict(method="draft", tree_width=1, max_draft_tokens=5),
    "draft tree": dict(method="draft", tree_width=3, max_draft_tokens=4),
    "layer skip": dict(method="layer_skip", early_exit=1, max_draft_tokens=3, tree_width=2),
    "auto": dict(method="auto", max_draft_tokens=4),
    "auto, adaptive": dict(method="auto", adaptive=True),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=23)


@pytest.fixture(scope="module")
def draft(model):
    return draft_of(model)


def draft_of(model, noise=0.05):
    """A model that agrees with `model` now and then."""
    torch.manual_seed(1)
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return made


def engine_of(model, draft=None, name=None, **settings):
    chosen = {"adaptive": False} | METHODS[name] if name else None
    speculation = SpeculationConfig(**chosen) if chosen else None
    wants = chosen and chosen["method"] in ("draft", "auto")
    sizes = {"page_size": 4, "num_pages": 200, "max_model_len": 128} | settings
    return Engine(model, draft_model=draft if wants else None, speculation=speculation, check=True, **sizes)


def requests(count=6, seed=3, **params):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 23, int(n)).tolist() for n in rng.integers(1, 30, count)]
    prompts[1] = prompts[0] + prompts[1]
    given = [SamplingParams(max_tokens=int(n), seed=i, **params) for i, n in enumerate(rng.integers(1, 40, count))]
    return prompts, given


def tokens(engine, prompts, params):
    outputs = engine.generate(prompts, params)
    assert [output.error for output in outputs] == [None] * len(outputs)
    engine.check()
    return [[one.token_ids for one in output.outputs] for output in outputs]


SAMPLING = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(temperature=0.7, top_p=0.9),
    "penalties": dict(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=3, top_k=8),
    "several": dict(temperature=1.0, n=3),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", SAMPLING)
def test_tokens_are_those_without_speculation(model, draft, name, kind):
    prompts, params = requests(**SAMPLING[kind])
    wanted = tokens(engine_of(model), prompts, params)
    with engine_of(model, draft, name) as engine:
        assert tokens(engine, prompts, params) == wanted
        assert tokens(engine, prompts, params) == wanted  # now that texts are known
        assert [tokens(engine, [p], [s])[0] for p, s in zip(prompts, params, strict=True)] == wanted
        stats = engine.speculation_stats()
        assert stats.proposed > 0 or "adaptive" in name
        assert engine.stats().pages_free == engine.stats().pages_total


@pytest.mark.parametrize("name", METHODS)
def test_under_preemption_and_in_chunks(model, draft, name):
    prompts, params = requests(12, temperature=0.9)
    wanted = tokens(engine_of(model), prompts, params)
    with engine_of(model, draft, name, num_pages=22, max_model_len=80, max_batch_tokens=16) as engine:
        assert tokens(engine, prompts, params) == wanted
        assert engine.stats().preemptions > 0
    with engine_of(model, draft, name, prefix_caching=False, max_sequences=3) as engine:
        assert tokens(engine, prompts, params) == wanted


@pytest.mark.parametrize("kind", SAMPLING)
def test_a_draft_model_that_is_the_target_is_always_right(model, kind):
    """Under sampling too: it draws with the row's own noise."""
    twin, (prompts, params) = copy.deepcopy(model), requests(**SAMPLING[kind])
    with engine_of(model, twin, "draft chain") as engine:
        tokens(engine, prompts, params)
        least = 0.9 if kind == "sampled" else 1.0  # its top_p is over its likeliest tokens only
        assert min(engine.speculation_stats().proposers["draft"].by_depth) >= least


def test_logprobs_are_the_same(model, draft):
    prompts, params = requests(temperature=0.8, logprobs=2)
    entries = [
        [one.logprobs for output in engine.generate(prompts, params) for one in output.outputs]
        for engine in (engine_of(model), engine_of(model, draft, "draft tree"))
    ]
    for one, other in zip(*entries, strict=True):
        assert [list(entry) for entry in one] == [list(entry) for entry in other]
        for a, b in zip(one, other, strict=True):
            assert [v.raw for v in a.values()] == pytest.approx([v.raw for v in b.values()], abs=1e-4)


def test_stops_within_accepted_drafts(model, draft):
    """Nothing behind a stop token is emitted or kept."""
    prompts, params = requests(temperature=0.0)
    plain = tokens(engine_of(model), prompts, params)
    stop = max(
        set(itertools.chain(*(row for rows in plain for row in rows))), key=lambda t: sum(t in r[0] for r in plain)
    )
    params = [SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=[stop]) for _ in params]
    wanted = tokens(engine_of(model), prompts, params)
    for name in METHODS:
        with engine_of(model, draft, name) as engine:
            assert tokens(engine, prompts, params) == wanted
            assert tokens(engine, prompts, params) == wanted


@pytest.mark.parametrize("most", [0, 1, 64])
def test_numbers_of_drafts(model, draft, most):
    prompts, params = requests(temperature=0.0)
    wanted = tokens(engine_of(model), prompts, params)
    for settings in (dict(method="draft", tree_width=1), dict(method="suffix"), dict(method="lookup")):
        config = SpeculationConfig(max_draft_tokens=most, adaptive=False, **settings)
        made = draft if config.method == "draft" else None
        with Engine(model, draft_model=made, speculation=config, max_batch_tokens=40, check=True) as engine:
            assert tokens(engine, prompts, params) == wanted
            assert (engine.speculation_stats().proposed == 0) == (most == 0)


def test_metrics_of_a_request(model, draft):
    prompts, params = requests(2, temperature=0.0)
    with engine_of(model, draft, "draft chain") as engine:
        metrics = engine.generate(prompts, params)[0].metrics
    assert metrics.draft_tokens >= metrics.accepted_tokens and metrics.verified_steps > 0


# -- faults


class Broken(torch.nn.Module):
    """Stands in for a head: gives NaN, or raises, from its `after`-th use on."""

    def __init__(self, head, after, raises):
        super().__init__()
        self.head, self.after, self.raises, self.uses = head, after, raises, 0

    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):
        self.uses += 1
        if self.uses > self.after and self.raises:
            raise RuntimeError("out of order")
        out = self.head(x)
        return out * float("nan") if self.uses > self.after else out


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("after", [20, 60])
def test_a_draft_model_that_goes_wrong(model, draft, raises, after, caplog):
    prompts, params = requests(temperature=0.0)
    wanted = tokens(engine_of(model), prompts, params)
    broken = copy.deepcopy(draft)
    broken.lm_head = Broken(broken.lm_head, 10**9, raises)
    with engine_of(model, broken, "draft tree") as engine, caplog.at_level(logging.WARNING, "hf_paged"):
        broken.lm_head.after = broken.lm_head.uses + after
        assert tokens(engine, prompts, params) == wanted
        assert tokens(engine, prompts, params) == wanted
        assert "nothing more is drafted" in caplog.text


def test_an_interrupt_in_the_middle_of_drafting(model, draft):
    prompts, params = requests(temperature=0.0)
    wanted = tokens(engine_of(model), prompts, params)
    with engine_of(model, draft, "draft tree") as engine:
        drafter = engine.speculator.drafter
        forward, uses = drafter.forward, itertools.count()

        def interrupted(plan):
            if next(uses) == 15:
                raise KeyboardInterrupt
            return forward(plan)

        interrupted.refresh = forward.refresh
        drafter.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, params)
        engine.check()
        assert tokens(engine, prompts, params) == wanted


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_drafts_that_poison_are_wiped_out(model, backend, prefix_caching, monkeypatch):
    """A draft token that makes the model's numbers infinite harms nobody, since it is not taken."""
    poisoned = copy.deepcopy(model)
    poisoned.model.embed_tokens.weight.data[22] = float("inf")
    prompts = [[t for t in p if t != 22] + [3] for p in requests()[0]]
    params = [SamplingParams(max_tokens=20, temperature=0.0, logit_bias={22: -100.0}) for _ in prompts]
    params[-3:] = [replace(p, temperature=1.0, n=3, seed=i) for i, p in enumerate(params[-3:])]
    wanted = tokens(engine_of(poisoned), prompts, params)
    settings = {"backend": backend, "prefix_caching": prefix_caching}
    if backend == "torch":
        monkeypatch.setattr("hf_paged.kernels.torch_path._native", lambda *args: None)
    with engine_of(poisoned, None, "lookup", **settings) as engine:
        speculator = engine.speculator
        texts = speculator.texts.of
        speculator.texts.of = lambda row, *rest: [_poison(p, row) for p in texts(row, *rest)]
        assert tokens(engine, prompts, params) == wanted
        assert engine.store.finite(list(range(1, 60)))


def test_tokens_that_a_model_rules_out_are_no_fault(model):
    """Logits of -inf say that a token cannot be: drafts are taken all the same, and their KV stays."""
    ruling = copy.deepcopy(model)
    ruling.lm_head = torch.nn.Linear(32, 23)
    ruling.lm_head.weight.data = model.lm_head.weight.data
    ruling.lm_head.bias.data.zero_()
    ruling.lm_head.bias.data[5] = -torch.inf
    prompts, params = requests()
    params = [replace(p, temperature=0.0) for p in params]
    wanted = tokens(engine_of(ruling), prompts, params)
    with engine_of(ruling, None, "lookup") as engine:
        assert tokens(engine, prompts, params) == wanted
        assert engine.speculation_stats().accepted > 0


def test_nothing_is_drafted_beside_steps_that_are_not_known(model, draft):
    """A step without drafts must have been measured, or any draft would seem to cost nothing."""
    for method in ("lookup", "draft", "auto"):
        with Engine(model, draft_model=None if method == "lookup" else draft, speculation=method) as engine:
            tokens(engine, [[2, 3, 4] * 5], [SamplingParams(max_tokens=5, temperature=0.0)])
            assert engine.speculation_stats().proposed == 0


def _poison(proposal, row):
    if row.index == 1:  # one of a request's rows goes on drafting when another gives it up
        return proposal
    return replace(proposal, tokens=(proposal.tokens[0], *[22] * (len(proposal) - 1)))


# -- the door of generate


def same(model, batch, **settings):
    torch.manual_seed(0)
    plain = model.generate(**batch, cache_implementation="paged", **settings)
    for drafting in (
        {"assistant_model": draft_of(model)},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_early_exit": 1},
        {"speculation": "suffix"},
        {"speculation": SpeculationConfig(method="auto", adaptive=False), "assistant_model": draft_of(model)},
        {"speculation": {"method": "lookup", "adaptive": False}},
    ):
        torch.manual_seed(0)
        ours = model.generate(**batch, cache_implementation="paged", **settings, **drafting)
        assert ours.tolist() == plain.tolist(), drafting
    REGISTRY.find(model).check()
    return plain


@pytest.fixture
def enabled():
    hf_paged.enable(check=True, page_size=4)
    yield
    hf_paged.disable()


class Counting(LogitsProcessor):
    """Keeps a state: what it does depends on how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.calls % scores.shape[1]] += 5
        return scores


class Sum(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([int(row.sum()) % 7 == 0 for row in input_ids])


def test_generate_takes_assistants_for_any_batch(enabled):
    model = tiny_llama(vocab_size=23)
    batch = left_padded(prompts_of(5, 9, 1, vocab_size=23))
    same(model, batch, max_new_tokens=20)
    same(model, batch, max_new_tokens=20, do_sample=True, temperature=0.8, num_return_sequences=2)
    same(model, batch, max_new_tokens=20, no_repeat_ngram_size=2, repetition_penalty=1.2)
    same(model, batch, max_new_tokens=12, prefix_allowed_tokens_fn=lambda i, ids: [3 + i, 5, 8, int(ids[-1]) % 20 + 2])
    same(model, batch, max_new_tokens=20, stopping_criteria=[Sum()])
    same(model, batch, max_new_tokens=20, eos_token_id=[5, 7])


def test_processors_with_a_state_are_asked_once_a_token(enabled):
    model, prompt = tiny_llama(vocab_size=23), prompts_of(6, vocab_size=23)[0]
    plain = model.generate(prompt, max_new_tokens=20, logits_processor=[Counting()])
    for drafting in ({"assistant_model": draft_of(model)}, {"prompt_lookup_num_tokens": 4}):
        counting = Counting()
        ours = model.generate(
            prompt, max_new_tokens=20, logits_processor=[counting], cache_implementation="paged", **drafting
        )
        assert ours.tolist() == plain.tolist() and counting.calls == 20


def test_scores_and_cache_with_an_assistant(enabled):
    model, batch = tiny_llama(vocab_size=23), left_padded(prompts_of(5, 9, vocab_size=23))
    settings = dict(max_new_tokens=9, return_dict_in_generate=True, output_scores=True, output_logits=True)
    plain = model.generate(**batch, **settings)
    ours = model.generate(**batch, **settings, cache_implementation="paged", assistant_model=draft_of(model))
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for a, b in zip(plain.scores + plain.logits, ours.scores + ours.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for a, b in zip(plain.past_key_values.layers, ours.past_key_values.layers, strict=True):
        keys, kept = a.keys * batch_mask(batch, a.keys), b.keys
        torch.testing.assert_close(keys, kept, atol=1e-4, rtol=1e-4)


def batch_mask(batch, keys):
    mask = torch.ones(keys.shape[0], keys.shape[2])
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    return mask[:, None, :, None]


def test_strategy_takes_a_draft_model():
    model, batch = tiny_llama(vocab_size=23), left_padded(prompts_of(5, 9, vocab_size=23))
    plain = model.generate(**batch, max_new_tokens=15)
    for extra in ({"draft_model": draft_of(model)}, {"speculation": "suffix"}):
        ours = model.generate(**batch, max_new_tokens=15, custom_generate=hf_paged.generate, **extra)
        assert ours.tolist() == plain.tolist()


def test_bad_drafts_are_refused(model, caplog):
    with pytest.raises(ValueError, match="vocabulary of 24 tokens, the model one of 23"):
        Engine(model, draft_model=tiny_llama(vocab_size=24))
    with pytest.raises(ValueError, match="draft_model=int"):
        Engine(model, draft_model=3, speculation="draft")
    with pytest.raises(ValueError, match="needs a draft_model"):
        Engine(model, speculation="draft")
    with pytest.raises(ValueError, match="early_exit=2 is not allowed: 1 to 1"):
        Engine(model, speculation=SpeculationConfig(method="layer_skip", early_exit=2))
    with caplog.at_level(logging.WARNING, "hf_paged"):
        Engine(model, draft_model=tiny_llama(vocab_size=23, num_hidden_layers=4))
    assert "it can hardly pay" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="magic"),
        dict(max_draft_tokens=65),
        dict(tree_width=0),
        dict(adaptive=1),
        dict(max_matching_ngram_size=0),
        dict(confidence_threshold=2),
        dict(method="layer_skip"),
        dict(suffix_tokens=1),
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="SpeculationConfig"):
        SpeculationConfig(**settings)
