"""A machine over the whole engine: whatever happens beside it, a request gets the tokens that it gets alone."""

from dataclasses import replace

import pytest
from engine_helpers import EOS, POISON, alone, assert_finite, assert_idle, fail, run, toy_core, toy_drafter, toy_scores
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged.params import SamplingParams
from hf_paged.scoring import Scoring, ScoringError
from hf_paged.speculation.config import SpeculationConfig

DRAFTING_PLACES = [f"drafting.{name}" for name in ("propose", "settle", "ended", "tidy")]
DRAFTING_PLACES += ["drafting.slots.reserve", "drafting.slots._clean"]
DRAFTING_PLACES += [f"toy_drafter.{name}" for name in ("forward", "propose", "taken", "copied", "settle", "tidy")]
DRAFTING_PLACES += ["store.move", "memory.rollback", "outcomes.take"]


@st.composite
def parameters(draw):
    """Any sampling parameters that the toy tokenizer's vocabulary takes."""
    n = draw(st.sampled_from([1, 1, 1, 2, 5]))
    given = {
        "n": n,
        "best_of": draw(st.sampled_from([None, n, n + 2])),
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.0])) if n == 1 else 1.0,
        "max_tokens": draw(st.integers(1, 8)),
        "cache_salt": draw(st.sampled_from([None, None, "a"])),
        "prefix_caching": draw(st.sampled_from([None, None, None, False])),
        "priority": draw(st.sampled_from([0.0, 0.0, -1.0, 3.0])),
        "ignore_eos": draw(st.booleans()),
        "stop": draw(st.sampled_from([(), (), ("ab",), ("c", "dd")])),
        "stop_token_ids": draw(st.sampled_from([(), (), (4, 5)])),
        "logprobs": draw(st.sampled_from([None, None, 0, 3])),
        "prompt_logprobs": draw(st.sampled_from([None, None, 1])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "logit_bias": draw(st.sampled_from([None, None, {EOS: 4.0}, {POISON: 4.0}])),
        "logits_processors": draw(st.sampled_from([(), (), (), (fail,)])),
    }
    if given["temperature"] == 0.0:
        given["best_of"] = None
    given["min_tokens"] = draw(st.integers(0, given["max_tokens"]))
    return SamplingParams(**given)


PLACES = ["memory.reserve", "memory.commit", "memory.open", "roster.finish", "roster.preempt", "outcomes.decode"]
PLACES += [f"memory.prefixes.{name}" for name in ("enter", "leave", "extend", "end", "discard", "evict", "_add")]
PLACES += [f"memory.pool.{name}" for name in ("share", "release", "keep", "drop")]
PLACES += [f"roster.{name}" for name in ("_release", "_wait", "_unwait", "_report")] + ["memory.close", "store.scrub"]


class EngineMachine(RuleBasedStateMachine):
    """Submit, step, cancel, forget, and let the model or an interrupt break that off, at random."""

    @initialize(
        num_pages=st.integers(1, 15),
        page_size=st.integers(1, 4),
        max_batch_tokens=st.sampled_from([1, 2, 5, 16]),
        max_sequences=st.integers(1, 5),
        caching=st.sampled_from([True, True, False]),
        most_logits=st.sampled_from([1, 3, 1000]),
    )
    def start(self, num_pages, page_size, max_batch_tokens, max_sequences, caching, most_logits):
        shape = (num_pages, page_size, max_batch_tokens, max_sequences)
        self.core = toy_core(*shape, eos=True, prefix_caching=caching)
        self.core.settings = replace(self.core.settings, max_logits=most_logits)
        self.requests = []
        self.most = num_pages * page_size + 1

    places = PLACES

    def speculator(self):
        return None

    @rule(
        prompt=st.one_of(
            st.lists(st.sampled_from([*range(6), POISON]), max_size=20),
            st.lists(st.integers(0, 1), max_size=20),  # many have prefixes in common
        ),
        params=parameters(),
        seed=st.integers(0, 3),
    )
    def submit(self, prompt, params, seed):
        fits = len(prompt) > 0 and len(prompt) + params.max_tokens <= self.most
        try:
            self.requests.append(self.core.submit(prompt, params, seed=seed, speculator=self.speculator()))
        except ValueError:
            assert not fits
        else:
            assert fits

    @rule(
        text=st.one_of(
            st.lists(st.sampled_from([*range(6), POISON]), min_size=1, max_size=20),
            st.lists(st.integers(0, 1), min_size=1, max_size=20),
        ),
        start=st.integers(1, 20),
        ends=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        salt=st.sampled_from([None, None, "a"]),
    )
    def score(self, text, start, ends, salt):
        start = min(start, len(text))
        fits = len(text) < self.most
        params = SamplingParams(max_tokens=1, cache_salt=salt)
        try:
            self.requests.append(self.core.submit_scoring(text, Scoring(start, tuple(ends)), params))
        except ValueError:
            assert not fits
        else:
            assert fits

    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            for request in self.core.step().finished:
                assert request.ended and request.finished

    @precondition(lambda self: self.core.busy)
    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        request = self.core.requests[which % len(self.core.requests)]
        assert self.core.cancel(request.request_id) and request.ended
        assert all(row.sequence is None for row in request.rows)

    @precondition(lambda self: self.core.busy)
    @rule(error=st.sampled_from([RuntimeError, KeyboardInterrupt]), when=st.sampled_from(["before", "after"]))
    def broken_forward(self, error, when):
        def broken(plan):
            raise error

        setattr(self.core.forward, when, broken)
        planned = len(self.core.forward.plans)
        try:
            self.core.step()
        except error:
            assert len(self.core.forward.plans) == planned + 1
        else:  # rows that shared their pages all had to sit this step out
            assert len(self.core.forward.plans) == planned
        setattr(self.core.forward, when, None)

    @rule()
    def forget(self):
        self.core.forget()

    @precondition(lambda self: self.core.busy)
    @rule(
        at=st.integers(1, 4),
        number=st.integers(0, 999),
        doing=st.sampled_from(["step", "step", "step", "cancel", "forget"]),
        which=st.integers(0, 9),
    )
    def interrupted(self, at, number, doing, which):
        place = self.places[number % len(self.places)]
        note(f"interrupted at {place}")
        owner, name = self.core, place
        if "." in place:
            *parts, name = place.split(".")
            for part in parts:
                owner = getattr(owner, part, None)
            if owner is None:
                return
        original, left = getattr(owner, name), [at]

        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        request = self.core.requests[which % len(self.core.requests)]
        setattr(owner, name, call)
        try:
            if doing == "cancel":
                self.core.cancel(request.request_id)
            else:
                getattr(self.core, doing)()
        except KeyboardInterrupt:
            pass
        finally:
            setattr(owner, name, original)
            left[0] = 0  # a row's text may keep the function

    @invariant()
    def laws(self):
        if not hasattr(self, "core"):
            return
        assert_finite(self.core)
        assert len(self.core.roster.running) <= self.core.settings.max_sequences
        open_requests = {r for r in self.requests if not r.ended}
        assert open_requests == set(self.core.requests)

    def teardown(self):
        if not hasattr(self, "core"):
            return
        run(self.core, 2000)
        assert_idle(self.core)
        for request in self.requests:
            if request.scoring is not None:
                compare_scores(request)
                continue
            expected = alone(request.prompt_ids, request.params, request.rows[0].sampling.seed, eos=True)
            compare(request, expected)


def compare_scores(request):
    scoring, text = request.scoring, request.prompt_ids
    assert request.ended
    if request.rows[0].finish_reason == "cancelled":
        return
    poisoned = POISON in text
    assert isinstance(request.error, ScoringError) == poisoned, request.error
    if not poisoned:
        assert scoring.left == 0 and scoring.logprobs == pytest.approx(toy_scores(text, scoring), abs=1e-5)


def compare(request, expected):
    cancelled = any(row.finish_reason == "cancelled" for row in request.rows)
    assert request.ended and (cancelled or type(request.error) is type(expected.error))
    for row, other in zip(request.rows, expected.rows, strict=True):
        if cancelled or request.error is not None:  # how far the rows came is not said
            both = min(len(row.output_ids), len(other.output_ids))
            assert row.output_ids[:both] == other.output_ids[:both]
            continue
        assert row.output_ids == other.output_ids
        assert (row.finish_reason, row.stop_reason) == (other.finish_reason, other.stop_reason)
        assert row.logprobs == other.logprobs and row.text_length == other.text_length
    if request.error is None and not cancelled:
        assert request.prompt_logprobs == expected.prompt_logprobs
        outputs, others = (r.output(lambda row: "").outputs for r in (request, expected))
        assert [o.token_ids for o in outputs] == [o.token_ids for o in others]


class DraftingMachine(EngineMachine):
    """The same with drafts, right and wrong ones, in chains and trees."""

    places = [*PLACES, *DRAFTING_PLACES]

    @initialize(
        odd=st.sampled_from([0, 2, 3]),
        method=st.sampled_from(["draft", "draft", "suffix", "lookup", "auto"]),
        width=st.integers(1, 3),
        depth=st.sampled_from([1, 3, 6]),
    )
    def speculate(self, odd, method, width, depth):
        self.given = SpeculationConfig(method=method, adaptive=False, max_draft_tokens=depth, tree_width=width), odd

    def speculator(self):
        config, odd = self.given
        if not self.core.drafting.speculators and config.method in ("draft", "auto"):
            self.core.toy_drafter = toy_drafter(self.core, odd)
        return self.core.drafting.speculator(config, getattr(self.core, "toy_drafter", None))


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


TestDraftingMachine = DraftingMachine.TestCase
TestDraftingMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
class TestEngineMachineLong(EngineMachine.TestCase):
    settings = settings(max_examples=1500, stateful_step_count=50, deadline=None)


@pytest.mark.slow
class TestDraftingMachineLong(DraftingMachine.TestCase):
    settings = settings(max_examples=500, stateful_step_count=50, deadline=None)
