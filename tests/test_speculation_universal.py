"""A draft model with another tokenizer: tokens are those without it, and its memory is its own."""

from __future__ import annotations

import copy
import itertools
import logging
import random

import pytest
import torch
from conftest import left_padded, tiny_llama
from tiny_tokenizers import LETTERS, TEXT, Slow, bytes_of, letters, permuted, spaces, trained
from transformers import set_seed

import hf_paged
from hf_paged import Engine, SamplingParams, SpeculationConfig
from hf_paged.integrations.registry import REGISTRY
from hf_paged.integrations.vocabularies import vocabularies
from hf_paged.memory import Memory
from hf_paged.speculation.draft_model import DraftModel
from hf_paged.speculation.mirror import Mirror
from hf_paged.speculation.universal import UniversalDraft


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=97)


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@pytest.fixture(scope="module")
def twin(model, tokenizer):
    return permuted(model, tokenizer)


@pytest.fixture(scope="module")
def cousin(model, tokenizer):
    """It agrees now and then."""
    return permuted(model, tokenizer, 0.05)


def engine_of(model, tokenizer, drafting=None, **settings):
    given = {}
    if drafting is not None:
        given = {"draft_model": drafting[0], "draft_tokenizer": drafting[1]}
        given["speculation"] = SpeculationConfig(method="draft", max_draft_tokens=4, adaptive=False)
    sizes = {"page_size": 4, "num_pages": 200, "max_model_len": 128} | settings
    return Engine(model, tokenizer=tokenizer, check=True, **given, **sizes)


def requests(count=6, seed=3, vocab_size=97, **params):
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, vocab_size) for _ in range(rng.randrange(1, 30))] for _ in range(count)]
    return prompts, [SamplingParams(max_tokens=rng.randrange(1, 40), seed=i, **params) for i in range(count)]


def tokens(engine, prompts, params):
    outputs = engine.generate(prompts, params)
    assert [output.error for output in outputs] == [None] * len(outputs)
    engine.check()
    return [[one.token_ids for one in output.outputs] for output in outputs]


def assert_empty(engine):
    """Neither the engine nor the draft model holds a page."""
    engine.check()
    pool = engine.speculator.drafter.memory.pool
    assert engine.stats().pages_free == engine.stats().pages_total and pool.free == pool.num_pages


SAMPLING = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(temperature=0.7, top_p=0.9),
    "penalties": dict(temperature=0.8, repetition_penalty=1.3, min_tokens=3, n=2),
}


@pytest.mark.parametrize("kind", SAMPLING)
def test_tokens_are_those_without_drafts(model, tokenizer, cousin, kind):
    prompts, params = requests(**SAMPLING[kind])
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, cousin) as engine:
        assert isinstance(engine.speculator.drafter, UniversalDraft)
        assert tokens(engine, prompts, params) == wanted
        assert [tokens(engine, [p], [s])[0] for p, s in zip(prompts[:2], params[:2], strict=True)] == wanted[:2]
        stats = engine.speculation_stats()
        assert 0 < stats.accepted < stats.proposed and stats.tokens_per_row > 1
        assert_empty(engine)


PAIRS = {
    "longer draft tokens": (letters, lambda: trained(140, LETTERS)),
    "shorter draft tokens": (lambda: trained(140, LETTERS), letters),
    "broken characters": (lambda: bytes_of(300), letters),
    "text that the draft cannot tell": (lambda: bytes_of(300), lambda: trained(60)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_any_two_tokenizers(name):
    one, other = (make() for make in PAIRS[name])
    model, draft = tiny_llama(vocab_size=len(one)), tiny_llama(vocab_size=len(other), num_hidden_layers=1)
    prompts, params = requests(vocab_size=len(one), temperature=0.9)
    prompts[0] = one("Tom eats 7 \u2014 \U0001f34e apples")["input_ids"] or [3]
    wanted = tokens(engine_of(model, one), prompts, params)
    with engine_of(model, one, (draft, other)) as engine:
        assert tokens(engine, prompts, params) == wanted
        assert not engine.speculator.drafter.failed and engine.speculator.drafter.seconds > 0
        assert_empty(engine)


def test_a_twin_is_always_right(model, tokenizer, twin):
    """Its KV outlives steps and follows what was taken: else it would be wrong now and then."""
    prompts, params = requests(temperature=0.0)
    with engine_of(model, tokenizer, twin) as engine:
        tokens(engine, prompts, params)
        assert min(engine.speculation_stats().proposers["draft"].by_depth) == 1.0
        assert engine.speculation_stats().tokens_per_row > 3


def test_adaptive_and_auto(model, tokenizer, cousin):
    prompts, params = requests(temperature=0.0)
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    for method in ("draft", "auto"):
        given = dict(draft_model=cousin[0], draft_tokenizer=cousin[1], speculation=method)
        with Engine(model, tokenizer=tokenizer, num_pages=99, check=True, **given) as engine:
            for _ in range(3):
                assert tokens(engine, prompts, params) == wanted


def test_preemption_and_chunks(model, tokenizer, cousin):
    prompts, params = requests(12, temperature=0.9)
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, cousin, num_pages=22, max_model_len=80, max_batch_tokens=16) as engine:
        assert tokens(engine, prompts, params) == wanted
        assert engine.stats().preemptions > 0
        assert engine.speculation_stats().accepted > 0
        assert_empty(engine)


def test_a_draft_without_room(model, tokenizer, cousin):
    """Rows for which its pages, or its positions, do not suffice get no drafts; the others do."""
    prompts, params = requests(12, temperature=0.9)
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, cousin) as engine:
        engine.speculator.drafter.memory = Memory(5, 4)
        assert tokens(engine, prompts, params) == wanted
        assert engine.speculation_stats().accepted > 0
        assert_empty(engine)
    with engine_of(model, tokenizer, cousin) as engine:
        engine.speculator.drafter.longest = 20
        assert tokens(engine, prompts, params) == wanted
        assert engine.speculation_stats().accepted > 0
    cousin[0].config.max_position_embeddings, before = 20, cousin[0].config.max_position_embeddings
    try:
        assert engine_of(model, tokenizer, cousin).speculator.drafter.longest == 20
    finally:
        cousin[0].config.max_position_embeddings = before


def test_a_row_ends_within_a_draft(model, tokenizer, twin):
    prompts, params = requests(temperature=0.0)
    plain = tokens(engine_of(model, tokenizer), prompts, params)
    stop = max(range(97), key=lambda t: sum(t in row[0] for row in plain))
    params = [SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=[stop]) for _ in params]
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, twin) as engine:
        assert tokens(engine, prompts, params) == wanted
        assert_empty(engine)


# -- faults


@pytest.mark.parametrize("part", ["forward", "encode", "ids", "NaN"])
def test_what_goes_wrong_is_logged_and_ends_drafting(model, tokenizer, cousin, part, caplog):
    prompts, params = requests(temperature=0.0)
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, cousin) as engine, caplog.at_level(logging.WARNING, "hf_paged"):
        drafter, uses = engine.speculator.drafter, itertools.count()
        forward, encode = drafter.forward, drafter.draft.encode

        def failing(given):
            if next(uses) < 9:
                return forward(given) if part in ("forward", "NaN") else encode(given)
            if part == "NaN":
                return forward(given) * float("nan")
            if part == "ids":
                return [97]
            raise RuntimeError("out of order")

        if part in ("forward", "NaN"):
            failing.refresh = forward.refresh
            drafter.forward = failing
        else:
            object.__setattr__(drafter.draft, "encode", failing)
        assert tokens(engine, prompts, params) == wanted
        assert tokens(engine, prompts, params) == wanted
        assert caplog.text.count("nothing more is drafted") == 1
        assert_empty(engine)


@pytest.mark.parametrize("part", ["forward", "encode"])
@pytest.mark.parametrize("after", [3, 10, 25])
def test_an_interrupt(model, tokenizer, cousin, part, after):
    prompts, params = requests(temperature=0.0)
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, cousin) as engine:
        drafter, uses = engine.speculator.drafter, itertools.count()
        owner = drafter if part == "forward" else drafter.draft
        before = getattr(owner, part)

        def interrupted(given):
            if next(uses) == after:
                raise KeyboardInterrupt
            return before(given)

        interrupted.refresh = getattr(before, "refresh", None)
        object.__setattr__(owner, part, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, params)
        assert_empty(engine)
        assert tokens(engine, prompts, params) == wanted
        assert_empty(engine)


def test_cancelled_and_forgotten(model, tokenizer, cousin):
    prompts, _ = requests()
    wanted = tokens(engine_of(model, tokenizer), prompts, SamplingParams(max_tokens=40, temperature=0.0))
    with engine_of(model, tokenizer, cousin) as engine:
        names = [engine.submit(prompt, SamplingParams(max_tokens=40, temperature=0.0)) for prompt in prompts]
        for _ in range(3):
            engine.step()
        pool = engine.speculator.drafter.memory.pool
        assert pool.held > 0
        cousin[0].lm_head.weight.data *= -1  # its KV stays, its drafts are of no use: tokens are what they were
        engine.step()
        cousin[0].lm_head.weight.data *= -1
        engine.forget()
        assert pool.held == 0
        engine.step()
        engine.step()
        outputs = {}
        for name in names[1:]:
            assert engine.cancel(name)
        while engine.has_work:
            outputs |= {output.request_id: output for output in engine.step()}
        assert outputs[names[0]].outputs[0].token_ids == wanted[0][0]
        assert_empty(engine)


# -- the other vocabulary


GROWING = {
    "bytes": lambda: (bytes_of(300), bytes_of(400)),
    "spaces": lambda: (spaces(120), spaces(200)),
    "bytes, spaces": lambda: (bytes_of(300), spaces(200)),
    "spaces, bytes": lambda: (spaces(120), bytes_of(400)),
    "slow": lambda: (Slow(bytes_of(300)), Slow(bytes_of(400))),
}


@pytest.mark.parametrize("name", GROWING)
def test_text_is_followed_as_it_grows(name):
    """Whatever is added at a time, the draft's tokens are those of the whole text."""
    one, other = GROWING[name]()
    target, draft = vocabularies((one, other), (512, 512))
    ids = one("".join(TEXT) * 2 + "caf\u00e9 \U0001f34e\u4e00" + TEXT[1])["input_ids"]
    rng, memory = random.Random(0), Memory(500, 4)
    for _ in range(10):
        mirror, at = Mirror(target, draft, memory.open([])), rng.randrange(1, len(ids))
        while at <= len(ids):
            mirror.follow(ids[:at], memory)
            own, text = mirror.sequence.tokens, mirror.told.text
            assert own[: mirror.length] == own == other(text)["input_ids"]
            assert one.decode(ids[:at]).rstrip("\ufffd") == text
            memory.reserve(mirror.sequence, mirror.sequence.pending)
            memory.commit(mirror.sequence, mirror.sequence.pending)
            # Drafts behind the text, right or wrong: those that turn out to be its own stay.
            guess = other("".join(TEXT))["input_ids"][rng.randrange(40) :][: rng.randrange(4)]
            mirror.sequence.tokens += guess
            at += rng.choice([1, 1, 1, 2, 3, 60])
        memory.close(mirror.sequence)
    memory.check()


def test_drafts_follow_the_rows_own_tokens():
    one, other = bytes_of(300), bytes_of(400)
    target, draft = vocabularies((one, other), (300, 400))

    def drafts(tokens, behind, ends=False):
        mirror = Mirror(target, draft, Memory(99, 4).open([]))
        mirror.follow(tokens, Memory(99, 4))
        mirror.sequence.tokens += other(behind)["input_ids"] + [other.eos_token_id] * ends
        return mirror.drafts(tokens)

    begin, behind = one("Tom has 12 apples")["input_ids"], " and eats 7 of them"
    whole = one("Tom has 12 apples" + behind)["input_ids"]
    assert drafts(begin, behind) == whole[len(begin) :]
    assert drafts(begin, behind, ends=True) == [*whole[len(begin) :], one.eos_token_id]
    assert drafts([*begin, one.eos_token_id], "") == []
    # The text's last word goes on: its tokens are others then.
    word, part = one(" them")["input_ids"], one(" the")["input_ids"]
    assert word[: len(part)] != part and drafts([*begin, *part], "m") == []
    # A character is not finished: drafts begin with the rest of it, where they begin with what is there of it.
    apple = one("\U0001f34e")["input_ids"]
    assert len(apple) == 4
    assert drafts([*begin, *apple[:2]], "\U0001f34e and") == [*apple[2:], *one(" and")["input_ids"]]
    assert drafts([*begin, *apple[:2]], " and") == []


def test_special_tokens_go_by_the_other_names():
    one, other = letters(), letters()
    one.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    other.add_special_tokens({"eos_token": "<|stop|>", "additional_special_tokens": ["<|call|>"]})
    target, draft = vocabularies((one, other), (98, 99))
    assert target.decode(one("<|user|>Hi<|end|><|pad|>")["input_ids"]) == "Hi<|end|><|pad|>"  # both know these
    assert draft.decode(other("<|call|>Hi<|stop|>")["input_ids"]) == "Hi<|end|>"
    assert draft.closing == {0, 1, *other("<|stop|><|call|>")["input_ids"]}
    one("Hi", truncation=True, max_length=1)
    assert len(target.encode("Hi there")) == 8  # settings of the caller's are not its own


# -- the doors


@pytest.fixture
def enabled():
    hf_paged.enable(check=True, page_size=4)
    yield
    hf_paged.disable()


def test_generate(enabled, model, tokenizer, cousin, ways):
    drafting = {"assistant_model": cousin[0], "tokenizer": tokenizer, "assistant_tokenizer": cousin[1]}
    one = left_padded([torch.tensor([requests()[0][0]])])
    five = left_padded([torch.tensor([prompt]) for prompt in requests(5)[0]])
    for batch in (one, five):
        for settings in ({}, {"do_sample": True, "temperature": 0.8}, {"stop_strings": ["e"], "tokenizer": tokenizer}):
            rows = []
            for extra in ({}, drafting):
                set_seed(0)
                made = model.generate(**batch, max_new_tokens=20, cache_implementation="paged", **(settings | extra))
                rows.append(made.tolist())
            assert rows[0] == rows[1]
    engine = REGISTRY.find(model)
    assert ways.taken() == "engine" and engine.speculation_stats().proposed > 0
    (drafter,) = engine.core.drafting.drafters
    assert isinstance(drafter, UniversalDraft) and not drafter.failed
    assert drafter.memory.pool.held == 0
    assert (
        model.generate(**five, max_new_tokens=20).tolist()
        == model.generate(**five, max_new_tokens=20, cache_implementation="paged", **drafting).tolist()
    )
    assert engine.core.drafting.drafters == [drafter]  # the same tokenizers: it is not made anew


def test_the_strategy(model, tokenizer, cousin):
    batch = left_padded([torch.tensor([prompt]) for prompt in requests(3)[0]])
    given = {"draft_model": cousin[0], "target_tokenizer": tokenizer, "draft_tokenizer": cousin[1]}
    ours = model.generate(**batch, max_new_tokens=15, custom_generate=hf_paged.generate, **given)
    assert ours.tolist() == model.generate(**batch, max_new_tokens=15).tolist()
    assert any(isinstance(one, UniversalDraft) for one in REGISTRY.find(model).core.drafting.drafters)


def test_equal_vocabularies_need_no_text(model, tokenizer):
    draft = copy.deepcopy(model)
    with engine_of(model, tokenizer, (draft, letters())) as engine:
        assert isinstance(engine.speculator.drafter, DraftModel)


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("size", [90, 99])
def test_one_vocabulary_of_two_sizes(model, tokenizer, size, kind):
    """The draft model has ids to spare, or lacks some that no tokenizer gives, though a prompt may hold them."""
    draft = copy.deepcopy(model)
    draft.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        draft.lm_head.weight[97:] *= 100  # what only the draft model knows is likely to it
    prompts, params = requests(vocab_size=90, **SAMPLING[kind])
    prompts[2] = [95, *prompts[2]]
    wanted = tokens(engine_of(model, tokenizer), prompts, params)
    with engine_of(model, tokenizer, (draft, letters())) as engine:
        assert isinstance(engine.speculator.drafter, DraftModel)
        assert tokens(engine, prompts, params) == wanted
        assert engine.speculation_stats().proposers["draft"].by_depth[0] > 0.5
        assert not engine.speculator.drafter.failed


def test_other_tokenizers_for_the_same_draft(model, tokenizer, cousin):
    with engine_of(model, tokenizer, cousin) as engine:
        first = engine.speculator.drafter
        config = SpeculationConfig(method="draft")
        assert engine.speculator_for(config, cousin[0], (tokenizer, cousin[1])).drafter is first
        second = engine.speculator_for(config, cousin[0]).drafter
        assert isinstance(second, DraftModel) and engine.core.drafting.drafters == [second]


def test_bad_tokenizers_are_refused(enabled, model, tokenizer, cousin):
    draft, other = tiny_llama(vocab_size=140), trained(140, LETTERS)
    for given, words in (
        ({}, "vocabulary of 140 tokens, the model one of 97: .* both tokenizers"),
        ({"tokenizer": tokenizer}, "vocabulary of 140 tokens"),
        ({"assistant_tokenizer": other}, "assistant_tokenizer is given without the model's own"),
        ({"tokenizer": tokenizer, "assistant_tokenizer": 3}, "assistant_tokenizer=int: must be a tokenizer"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(
                torch.tensor([[5, 6]]), max_new_tokens=2, cache_implementation="paged", assistant_model=draft, **given
            )
    with pytest.raises(ValueError, match="draft_tokenizer is given without the model's own"):
        Engine(model, draft_model=draft, draft_tokenizer=other)
    with pytest.raises(ValueError, match="draft_tokenizer is given without a draft_model"):
        Engine(model, tokenizer=tokenizer, draft_tokenizer=other)
