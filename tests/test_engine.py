"""`hf_paged.Engine` over tiny random models: every way to ask it, and tokens equal to `model.generate`'s."""

import threading

import pytest
import torch
from conftest import prompts_of, tiny_llama
from state_helpers import answers_despite, raising_behind
from transformers import set_seed

import hf_paged
from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(max_tokens=12, top_p=0.95)
LENGTHS = (5, 17, 1, 40, 9, 3)
PROMPTS = [p[0].tolist() for p in prompts_of(*LENGTHS)]
BAD = 98  # its embedding is not a number in `broken_model`


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def text_model():
    """A random model over the bundled tokenizer's vocabulary."""
    return tiny_llama(vocab_size=4096)


@pytest.fixture(scope="module")
def greedy(model):
    """What `generate` gives for each of `PROMPTS` alone."""
    return [expected(model, prompt) for prompt in PROMPTS]


def expected(model, prompt, new_tokens=12):
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, len(prompt) :].tolist()


def make(model, **settings):
    return Engine(model, **({"num_pages": 64, "page_size": 4, "check": True} | settings))


def tokens(outputs):
    """Generated ids: of one completion each, or of all where there are several."""
    found = [[o.token_ids for o in output.outputs] for output in outputs]
    return [ids[0] if len(ids) == 1 else ids for ids in found]


def assert_idle(engine):
    engine.check()
    stats = engine.stats()
    assert not engine.core.busy and stats.pages_free == stats.pages_total


# -- tokens


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize(("max_batch_tokens", "max_sequences"), [(1, 3), (7, 3), (512, 1), (512, 3), (512, 16)])
def test_greedy_tokens_are_those_of_generate(model, greedy, page_size, max_batch_tokens, max_sequences):
    engine = make(
        model,
        page_size=page_size,
        num_pages=max(6, 300 // page_size),
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )
    assert tokens(engine.generate(PROMPTS, GREEDY)) == greedy
    assert_idle(engine)


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_small_pool_forces_preemption(model, greedy, page_size):
    engine = make(model, page_size=page_size, num_pages=60 // page_size)
    assert tokens(engine.generate(PROMPTS, GREEDY)) == greedy
    assert engine.stats().preemptions > 0
    assert_idle(engine)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_sequences": 1},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 7},
        {"num_pages": 15},
        {"page_size": 1, "num_pages": 300},
        {"page_size": 256, "num_pages": 3},
    ],
)
def test_sampled_tokens_do_not_depend_on_the_engine(model, settings):
    """The one law: alone, in a batch, in chunks, preempted."""
    params = [
        SamplingParams(max_tokens=12, seed=5),
        SamplingParams(max_tokens=12, seed=-3, temperature=0.7, top_k=20),
        SamplingParams(max_tokens=12, seed=5, top_p=0.8, repetition_penalty=1.2),
        SamplingParams(max_tokens=12, seed=2**63, min_p=0.02, presence_penalty=0.5),
        SamplingParams(max_tokens=6, seed=1, n=3),
        SamplingParams(max_tokens=6, seed=1, n=2, best_of=4, logprobs=2),
    ]
    alone = make(model)
    wanted = [alone.generate(prompt, p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    engine = make(model, **settings)
    got = engine.generate(PROMPTS, params)
    assert tokens(got) == tokens(wanted)
    for ours, theirs in zip(got[5].outputs, wanted[5].outputs, strict=True):
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
    assert_idle(engine)


def test_a_model_that_is_not_lean(greedy):
    """A hook sends the engine through the model's own forward."""
    model = tiny_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert tokens(make(model).generate(PROMPTS, GREEDY)) == greedy


# -- seeds


def test_set_seed_makes_calls_repeatable(model):
    engine = make(model)
    runs = []
    for seed in (1, 1, 2):
        set_seed(seed)
        runs.append([tokens(engine.generate(PROMPTS[:3], SAMPLED)), tokens(engine.generate(PROMPTS[:3], SAMPLED))])
    assert runs[0] == runs[1] != runs[2] and runs[0][0] != runs[0][1]
    set_seed(1)
    assert tokens(make(model, max_sequences=1).generate(PROMPTS[:3], SAMPLED)) == runs[0][0]


def test_equal_prompts_draw_different_tokens(model):
    same = tokens(make(model).generate([PROMPTS[0]] * 4, SAMPLED))
    assert len({tuple(ids) for ids in same}) > 1


@pytest.mark.parametrize("count", [1, 3])
def test_the_callers_generator_advances_once_a_call(model, count):
    engine = make(model)
    set_seed(7)
    torch.randint(0, 2**63 - 1, (1,))
    once = torch.get_rng_state()
    for call in (
        lambda: engine.generate(PROMPTS[:count], SAMPLED),
        lambda: list(engine.stream(PROMPTS[0], SAMPLED)),
        lambda: engine.submit(PROMPTS[0], SAMPLED),
    ):
        set_seed(7)
        call()
        assert torch.equal(torch.get_rng_state(), once)
    engine.close()


@pytest.mark.parametrize("seeded", ["greedy", "params", "config"])
def test_the_callers_generator_is_left_alone(model, seeded):
    engine = make(model, seed=3 if seeded == "config" else None)
    params = {"greedy": GREEDY, "params": SamplingParams(seed=1), "config": SAMPLED}[seeded]
    before = torch.get_rng_state()
    engine.generate(PROMPTS[:2], params)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_of_the_engine_repeats_its_whole_run(model):
    runs = []
    for seed in (3, 3, 4):
        engine = make(model, seed=seed)
        runs.append([tokens(engine.generate(PROMPTS[:2], SAMPLED)) for _ in range(2)])
    assert runs[0] == runs[1] != runs[2] and runs[0][0] != runs[0][1]


# -- ways to ask


def test_prompts_in_every_form(model, greedy):
    engine = make(model)
    first, second = PROMPTS[0], PROMPTS[1]
    for one in (first, tuple(first), torch.tensor(first), torch.tensor(first).numpy(), list(torch.tensor(first))):
        assert tokens(engine.generate(one, GREEDY)) == greedy[:1]
    for several in ([first, second], (first, torch.tensor(second)), [torch.tensor(first).numpy(), tuple(second)]):
        assert tokens(engine.generate(several, GREEDY)) == greedy[:2]
    assert tokens(engine.generate(torch.tensor([first, first]), GREEDY)) == greedy[:1] * 2
    assert engine.generate([], GREEDY) == []
    for odd in ({"input_ids": [first]}, None, 7):
        with pytest.raises(ValueError, match="prompts is a"):
            engine.generate(odd, GREEDY)


def test_parameters_for_all_or_one_each(model, greedy):
    engine = make(model)
    short = SamplingParams(temperature=0.0, max_tokens=2)
    mixed = engine.generate(PROMPTS[:2], [GREEDY, short])
    assert tokens(mixed) == [greedy[0], greedy[1][:2]]
    assert len(tokens(engine.generate(PROMPTS[:2], [None, GREEDY]))[0]) == SamplingParams().max_tokens
    assert len(engine.generate(PROMPTS[0])[0].outputs[0].token_ids) == SamplingParams().max_tokens
    with pytest.raises(ValueError, match="3 entries for 2 prompts"):
        engine.generate(PROMPTS[:2], [GREEDY] * 3)
    assert_idle(engine)


def test_results_come_in_order_and_are_complete(model):
    engine = make(model, max_sequences=2)
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (9, 1, 5, 2, 7, 3)]
    results = engine.generate(PROMPTS, params, use_tqdm=True)
    for result, prompt, param in zip(results, PROMPTS, params, strict=True):
        assert isinstance(result, RequestOutput) and result.finished and result.error is None
        assert result.prompt_token_ids == prompt and result.prompt is None
        (output,) = result.outputs
        assert len(output.token_ids) == param.max_tokens and output.finish_reason == "length" and output.text == ""
        metrics = result.metrics
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    assert len({result.request_id for result in results}) == 6


def test_generate_iter_gives_results_as_they_finish(model, greedy):
    engine = make(model)
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (9, 1, 5)]
    found = list(engine.generate_iter(PROMPTS[:3], params))
    assert [len(r.outputs[0].token_ids) for r in found] == [1, 5, 9]
    iterator = engine.generate_iter(PROMPTS, GREEDY)
    assert tokens([next(iterator)])[0] in greedy
    iterator.close()
    assert_idle(engine)


def test_stream(model, greedy):
    engine = make(model)
    events = list(engine.stream(PROMPTS[1], GREEDY))
    assert [e.token_id for e in events] == greedy[1] and {e.text for e in events} == {""}
    assert [e.finish_reason for e in events] == [None] * 11 + ["length"]
    assert len({e.request_id for e in events}) == 1 and {e.logprob for e in events} == {None}
    with_logprobs = list(engine.stream(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=3, logprobs=0)))
    assert [e.logprob.token_id for e in with_logprobs] == greedy[1][:3]


def test_stream_of_several_completions(model):
    engine = make(model, max_sequences=2)
    params = SamplingParams(n=5, max_tokens=4, seed=1)
    events = list(engine.stream(PROMPTS[0], params))
    rows = [[e.token_id for e in events if e.index == i] for i in range(5)]
    assert rows == tokens(engine.generate(PROMPTS[0], params))[0]
    assert sum(e.finish_reason == "length" for e in events) == 5


def test_a_stream_that_is_closed_cancels_its_request(model):
    engine = make(model)
    stream = engine.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert engine.core.busy
    stream.close()
    assert_idle(engine)


def test_submit_step_cancel(model, greedy):
    engine = make(model, max_sequences=2)
    names = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[:3]]
    named = engine.submit(PROMPTS[3], GREEDY, request_id="mine")
    assert named == "mine" and engine.has_work
    with pytest.raises(ValueError, match="'mine' is taken"):
        engine.submit(PROMPTS[3], GREEDY, request_id="mine")
    assert engine.step() == []
    assert engine.cancel(names[1]) and not engine.cancel(names[1]) and not engine.cancel("nobody")
    found = {}
    while engine.has_work:
        found |= {result.request_id: result for result in engine.step()}
    assert tokens(found[name] for name in (names[0], names[2], named)) == [greedy[0], greedy[2], greedy[3]]
    cancelled = found[names[1]].outputs[0]
    assert cancelled.finish_reason == "cancelled" and greedy[1][: len(cancelled.token_ids)] == cancelled.token_ids
    assert engine.step() == []
    assert_idle(engine)


def test_submitted_requests_advance_while_others_generate(model, greedy):
    engine = make(model)
    name = engine.submit(PROMPTS[0], GREEDY)
    assert tokens(engine.generate(PROMPTS[1:], GREEDY)) == greedy[1:]
    assert engine.has_work
    (result,) = engine.step()
    assert result.request_id == name and tokens([result]) == greedy[:1] and not engine.has_work


# -- texts


def test_texts(text_model, tokenizer):
    engine = make(text_model, tokenizer=tokenizer)
    texts = ["def add(a, b):", "import os\n", "für jede Größe €"]
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    for result, text in zip(engine.generate(texts, params), texts, strict=True):
        assert result.prompt == text and result.prompt_token_ids == tokenizer(text)["input_ids"]
        output = result.outputs[0]
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=True)
    assert tokens(engine.generate("def f", params)) == tokens(
        engine.generate([tokenizer("def f")["input_ids"]], params)
    )


@pytest.mark.parametrize("seed", range(4))
def test_stream_pieces_join_to_the_text(text_model, tokenizer, seed):
    """Also where a stop string ends it, that lies across tokens, and where characters have several tokens."""
    engine = make(text_model, tokenizer=tokenizer)
    params = dict(max_tokens=40, seed=seed, ignore_eos=True)
    text = engine.generate("x = 1", SamplingParams(**params))[0].outputs[0].text
    pieces = [event.text for event in engine.stream("x = 1", SamplingParams(**params))]
    assert "".join(pieces) == text and sum(map(bool, pieces)) > 5
    ends = [at for at in range(len(text) // 2, len(text) - 5) if "\ufffd" not in text[at : at + 5]]
    stop = text[ends[0] : ends[0] + 5]
    for stops in (stop, [stop + "?", stop, "never there"]):
        output = engine.generate("x = 1", SamplingParams(stop=stops, **params))[0].outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == text[: text.index(stop)]
        events = list(engine.stream("x = 1", SamplingParams(stop=stops, **params)))
        assert "".join(event.text for event in events) == output.text and events[-1].finish_reason == "stop"
    assert_idle(engine)


def test_end_of_text_is_not_in_the_text(tokenizer):
    model = tiny_llama(vocab_size=4096)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    engine = make(model, tokenizer=tokenizer)
    bias = {tokenizer.eos_token_id: 1000.0}
    output = engine.generate("a", SamplingParams(min_tokens=3, logit_bias=bias))[0].outputs[0]
    assert output.token_ids[3:] == [tokenizer.eos_token_id] and output.finish_reason == "stop"
    assert output.text == tokenizer.decode(output.token_ids[:3])


def test_bad_words(text_model, tokenizer):
    engine = make(text_model, tokenizer=tokenizer)
    plain = engine.generate("x", SamplingParams(temperature=0.0))[0].outputs[0]
    word = next(w for w in plain.text.split() if len(w) > 3 and "\ufffd" not in w)
    output = engine.generate("x", SamplingParams(temperature=0.0, bad_words=[word]))[0].outputs[0]
    assert word in plain.text.split() and word not in output.text.split()


# -- what goes wrong


def test_refused_prompts_carry_their_error_and_others_go_on(model, greedy):
    engine = make(model, num_pages=16)
    odd = [[], [1, 99], [1] * 65, ["x"], None, "text without a tokenizer", [1.5]]
    results = engine.generate([PROMPTS[0], *odd, PROMPTS[1]], GREEDY)
    assert tokens([results[0], results[-1]]) == greedy[:2]
    messages = [str(result.error) for result in results[1:-1]]
    for message, part in zip(messages, ("empty", "99", "65 tokens", "ids", "ids", "tokenizer", "ids"), strict=True):
        assert part in message
    assert all(isinstance(r.error, ValueError) and r.outputs == [] and r.finished for r in results[1:-1])
    with pytest.raises(ValueError, match="empty"):
        engine.generate([PROMPTS[0], [], PROMPTS[1]], GREEDY, raise_errors=True)
    for prompt in odd:
        with pytest.raises(ValueError):
            engine.submit(prompt, GREEDY)
        with pytest.raises(ValueError):
            next(engine.stream(prompt, GREEDY))
    assert_idle(engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lean", [True, False])
def test_nan_from_the_model_ends_one_request(dtype, lean):
    """In prompts of one step and of several, and while others decode beside it, first or last in the batch."""
    model = tiny_llama().to(dtype)
    model.model.embed_tokens.weight.data[BAD] = torch.nan
    if not lean:
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    wanted = tokens(make(model).generate(PROMPTS, GREEDY))
    engine = make(model, max_batch_tokens=24)
    first_token = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={BAD: 1e4})
    bad = [[2] * 50, [BAD] * 40, [5, BAD, 6], [3] * 30 + [BAD], [7]]
    params = [first_token, GREEDY, GREEDY, GREEDY, first_token]
    results = engine.generate([bad[0], *PROMPTS, *bad[1:]], [params[0], *[GREEDY] * len(PROMPTS), *params[1:]])
    fine, failed = results[1 : 1 + len(PROMPTS)], [results[0], *results[1 + len(PROMPTS) :]]
    assert [r.error for r in fine] == [None] * len(PROMPTS)
    if dtype == torch.float32:
        assert tokens(fine) == wanted
    for result in failed:
        assert "NaN" in str(result.error) and result.outputs[0].finish_reason == "error"
    assert tokens([failed[0], failed[-1]]) == [[BAD], [BAD]]
    assert all(bool(torch.isfinite(t).all()) for t in (*engine.store.keys, *engine.store.values))
    assert_idle(engine)


def test_a_processor_that_raises_ends_one_request(model, greedy):
    def fail(ids, scores):
        raise RuntimeError("on purpose")

    engine = make(model)
    params = [GREEDY, SamplingParams(logits_processors=[fail]), GREEDY]
    results = engine.generate(PROMPTS[:3], params)
    assert tokens([results[0], results[2]]) == [greedy[0], greedy[2]]
    assert "on purpose" in str(results[1].error)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(engine.stream(PROMPTS[0], params[1]))
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.generate(PROMPTS[:3], params, raise_errors=True)
    assert_idle(engine)


def test_logits_processors_of_transformers(model):
    from transformers import NoRepeatNGramLogitsProcessor

    engine = make(model)
    params = SamplingParams(temperature=0.0, max_tokens=30, logits_processors=[NoRepeatNGramLogitsProcessor(2)])
    for prompt, ids in zip(PROMPTS, tokens(engine.generate(PROMPTS, params)), strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, no_repeat_ngram_size=2)
        assert ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises(model, greedy, error, monkeypatch):
    engine = make(model)
    engine.core.stepper = None  # see test_few_steps.py
    left = [4]
    monkeypatch.setattr(engine.core, "forward", raising_behind(engine.core.forward, left, error))
    with pytest.raises(error):
        engine.generate(PROMPTS, GREEDY)
    assert_idle(engine)
    left[0] = 3
    assert tokens(answers_despite(engine, PROMPTS, [GREEDY] * len(PROMPTS), error, left)) == greedy
    assert_idle(engine)


def test_threads_share_an_engine(model, greedy):
    engine = make(model, num_pages=40)
    found, errors = {}, []

    def work(name):
        try:
            if name % 3 == 0:
                found[name] = tokens(engine.generate(PROMPTS, GREEDY))
            elif name % 3 == 1:
                found[name] = [[e.token_id for e in engine.stream(prompt, GREEDY)] for prompt in PROMPTS]
            else:
                found[name] = [None] * len(PROMPTS)
                for result in engine.generate_iter(PROMPTS, GREEDY):
                    found[name][PROMPTS.index(result.prompt_token_ids)] = result.outputs[0].token_ids
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and all(found[i] == greedy for i in range(6))
    assert_idle(engine)


# -- the engine itself


def test_context_manager_and_close(model):
    with make(model) as engine:
        engine.submit(PROMPTS[0], GREEDY)
        engine.step()
    assert engine.store.keys == [] and engine.core.stats().pages_free == 64
    (result,) = engine.step()
    assert result.outputs[0].finish_reason == "cancelled"
    for call in (engine.generate, engine.submit, lambda prompt: next(engine.stream(prompt))):
        with pytest.raises(ValueError, match="closed"):
            call(PROMPTS[0])
    engine.close()


def test_settings(model):
    for engine in (
        Engine(model, EngineConfig(num_pages=5, page_size=2)),
        Engine(model, {"num_pages": 5, "page_size": 2}),
        Engine(model, num_pages=5, page_size=2),
    ):
        assert engine.stats().pages_total == 5 and engine.config == EngineConfig(num_pages=5, page_size=2)
    with pytest.raises(ValueError, match="not both"):
        Engine(model, EngineConfig(), num_pages=5)
    with pytest.raises(ValueError, match="'pages'"):
        Engine(model, pages=5)
    with pytest.raises(ValueError, match="draft_model=int"):
        Engine(model, draft_model=3)
    assert hf_paged.Engine is Engine


def test_the_models_limit_holds(model):
    engine = make(model, num_pages=200)
    with pytest.raises(ValueError, match="max_model_len allows 256"):
        engine.submit([1] * 250, SamplingParams(max_tokens=10))
    (result,) = make(model, max_model_len=20).generate([PROMPTS[0]], SamplingParams(max_tokens=None))
    assert len(result.outputs[0].token_ids) == 15


def test_the_model_is_left_as_found(model):
    model.train()
    before = model.config._attn_implementation
    make(model).generate(PROMPTS[:1], GREEDY)
    assert model.training and all(module.training for module in model.modules())
    assert model.config._attn_implementation == before
    model.eval()


def test_stats(model):
    engine = make(model)
    engine.generate(PROMPTS, GREEDY)
    stats = engine.stats()
    assert stats.prompt_tokens == sum(LENGTHS) and stats.generated_tokens == 12 * len(LENGTHS)
    assert stats.peak_running == len(LENGTHS) and stats.steps == 12 and stats.rows == 12 * len(LENGTHS)
    assert 0 < stats.forward_seconds < stats.step_seconds and 0 <= stats.kv_waste < 0.3
    assert stats.page_bytes == 2 * 2 * 8 * 2 * 4 * 4, "two layers, keys and values of two heads of 8, 4 float32 slots"
    assert stats.kv_bytes_peak == stats.peak_pages * stats.page_bytes >= stats.peak_live_bytes > 0
    engine.reset_stats()
    assert engine.stats().steps == 0 and engine.stats().pages_total == 64
