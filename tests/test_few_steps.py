"""Decode steps on a CPU, several in one compiled call: the tokens of the loop, whatever ends or fails in between."""

from __future__ import annotations

import pytest
import torch
from conftest import prompts_of, tiny_llama
from state_helpers import answers_despite, raising_behind, tiny_neox

from hf_paged import Engine, SamplingParams
from hf_paged.integrations.few_stepper import MOST, FewStepper
from hf_paged.kernels.native import native_ops

pytestmark = pytest.mark.skipif(native_ops() is None, reason="there are no compiled ops")

PROMPTS = [p[0].tolist() for p in prompts_of(5, 17, 1, 40, 9, 3)]
PARAMS = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(temperature=1.0),
    "filtered": dict(temperature=0.7, top_p=0.8, top_k=20, min_p=0.01),
    "stops": dict(temperature=1.0, stop_token_ids=tuple(range(0, 99, 9))),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def params_of(kind):
    return [SamplingParams(max_tokens=7 * i + 1, seed=i, **PARAMS[kind]) for i in range(len(PROMPTS))]


def engine_of(model, **settings):
    return Engine(model, **{"page_size": 4, "num_pages": 120, "check": True, **settings})


def tokens(engine, prompts, params):
    outputs = engine.generate(prompts, params)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.outputs[0].token_ids for output in outputs]


def assert_idle(engine):
    engine.check()
    assert not engine.core.busy and engine.stats().pages_free == engine.stats().pages_total


@pytest.fixture
def bursts(monkeypatch):
    """Steps that were asked for, burst by burst, from now on."""
    seen, run = [], FewStepper.run
    monkeypatch.setattr(FewStepper, "run", lambda self, rows, steps: seen.append(steps) or run(self, rows, steps))
    return seen


@pytest.mark.parametrize("settings", [{}, {"max_sequences": 3}, {"num_pages": 32}, {"prefix_caching": False}], ids=str)
@pytest.mark.parametrize("kind", PARAMS)
def test_bursts_change_no_token(model, kind, settings, bursts):
    with engine_of(model, **settings) as plain:
        plain.core.stepper = None
        wanted = tokens(plain, PROMPTS, params_of(kind))
    assert not bursts
    with engine_of(model, **settings) as engine:
        assert tokens(engine, PROMPTS, params_of(kind)) == wanted
        assert max(bursts) > 1
        assert_idle(engine)


def test_greedy_and_sampling_rows_share_a_burst(model, bursts):
    params = [SamplingParams(temperature=float(i % 2), max_tokens=30, seed=i, ignore_eos=True) for i in range(6)]
    with engine_of(model) as engine:
        alone = [tokens(engine, [prompt], [given])[0] for prompt, given in zip(PROMPTS, params, strict=True)]
        assert tokens(engine, PROMPTS, params) == alone
    assert max(bursts) == MOST


def test_rows_that_share_a_prefix_are_computed_together(model):
    """The slots that many rows see, and the places of their own, are those of the loop's steps."""
    prefix = prompts_of(180, seed=7)[0][0].tolist()
    prompts = [prefix + prompt for prompt in PROMPTS * 2]
    params = [SamplingParams(temperature=1.0, max_tokens=25, seed=i, ignore_eos=True) for i in range(len(prompts))]
    with engine_of(model, num_pages=400) as plain:
        plain.core.stepper = None
        wanted = tokens(plain, prompts, params)
    with engine_of(model, num_pages=400) as engine:
        assert tokens(engine, prompts, params) == wanted


@pytest.mark.parametrize("heads", [(16, 1), (12, 1), (8, 2)], ids=str)
def test_queries_of_many_heads_are_groups_by_themselves(heads):
    """Behind 64 slots: what such a group sees grows with every step."""
    model = tiny_llama(hidden_size=8 * heads[0], num_attention_heads=heads[0], num_key_value_heads=heads[1])
    prompts = [prompt[:-i] for i, prompt in enumerate([prompts_of(80, seed=4)[0][0].tolist()] * 3, 1)]
    params = [SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)] * 3
    with engine_of(model, prefix_caching=False) as plain:
        plain.core.stepper = None
        wanted = tokens(plain, prompts, params)
    with engine_of(model, prefix_caching=False) as engine:
        assert tokens(engine, prompts, params) == wanted


def test_a_burst_ends_with_the_first_row(model, monkeypatch):
    made, steps = [], FewStepper._steps

    def noted(self, few, rows, count):
        told = list(steps(self, few, rows, count))
        made.append((count, len(told)))
        return iter(told)

    monkeypatch.setattr(FewStepper, "_steps", noted)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (5, 40, 40)]
    with engine_of(model) as engine:
        assert list(map(len, tokens(engine, PROMPTS[:3], params))) == [5, 40, 40]
        # What was reserved for steps that were not made is given back.
        assert_idle(engine)
    assert any(count > told for count, told in made)


def test_others_do_not_wait_long(model, monkeypatch):
    seen, run = [], FewStepper.run
    with engine_of(model, max_sequences=2) as engine:

        def noted(self, rows, steps):
            seen.append((engine.core.roster.waits, steps))
            return run(self, rows, steps)

        monkeypatch.setattr(FewStepper, "run", noted)
        tokens(engine, PROMPTS, [SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)] * len(PROMPTS))
    assert max(steps for waits, steps in seen if waits) <= 8 < max(steps for waits, steps in seen if not waits)


def test_what_a_stop_string_leaves_behind_is_thrown_away(tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with engine_of(model, tokenizer=tokenizer) as engine:
        (whole,) = engine.generate(["one two"], params)
        text, ids = whole.outputs[0].text, whole.outputs[0].token_ids
        at = len(text) // 2
        stopped = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop=[text[at : at + 4]])
        (part,) = engine.generate(["one two"], stopped)
        first = text.find(text[at : at + 4])
        assert part.outputs[0].text == text[:first] and part.outputs[0].finish_reason == "stop"
        assert part.outputs[0].token_ids == ids[: len(part.outputs[0].token_ids)]
        assert_idle(engine)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_a_burst_takes_nothing(model, error):
    params = params_of("greedy")
    with engine_of(model) as engine:
        wanted = tokens(engine, PROMPTS, params)
        left = [2]
        engine.core.stepper.op = raising_behind(engine.core.stepper.op, left, error)
        with pytest.raises(error):
            engine.generate(PROMPTS, params)
        assert_idle(engine)
        left[0] = 3
        results = answers_despite(engine, PROMPTS, params, error, left)
        assert [result.outputs[0].token_ids for result in results] == wanted
        assert_idle(engine)


def test_a_row_whose_logits_are_not_finite_fails_alone(model):
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[:, 3] = model.lm_head.weight[:, 3]
        for bad in range(60, 99):
            broken.model.embed_tokens.weight[bad] = torch.nan
    params = [SamplingParams(temperature=1.0, max_tokens=40, seed=i, ignore_eos=True) for i in range(6)]
    prompts = [[token % 60 for token in prompt] for prompt in PROMPTS]
    with engine_of(broken, prefix_caching=False) as engine:
        together = engine.generate(prompts, params)
        alone = [engine.generate([p], [given])[0] for p, given in zip(prompts, params, strict=True)]
        assert [str(o.error) for o in together] == [str(o.error) for o in alone]
        assert "NaN" in str(together[0].error)
        assert_idle(engine)


def test_what_the_compiled_steps_do_not_serve_goes_the_long_way(model, bursts):
    with engine_of(model) as engine:
        for extra in ({"logprobs": 1}, {"repetition_penalty": 1.2}, {"logit_bias": {3: 1.0}}):
            tokens(engine, PROMPTS[:1], SamplingParams(temperature=0.0, max_tokens=20, **extra))
    with engine_of(tiny_neox()) as engine:
        assert engine.core.stepper.most == 0
        tokens(engine, PROMPTS[:2], SamplingParams(temperature=0.0, max_tokens=20))
    assert bursts == []


def test_windows_that_hide_something_go_the_long_way(bursts, monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=24)).eval()
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with engine_of(model) as engine:
        got, told = tokens(engine, PROMPTS[:1], [params]), []
        steps = FewStepper._steps
        monkeypatch.setattr(FewStepper, "_steps", lambda *given: told.append(1) or steps(*given))
        tokens(engine, [PROMPTS[3]], [params])
    wanted = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert got[0] == wanted[0, len(PROMPTS[0]) :].tolist() and bursts and not told
