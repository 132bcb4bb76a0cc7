"""The generate contract, "State": exceptions and interrupts, from anywhere, at any moment."""

import random
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import assert_clean, engine_of, left_padded, prompts_of, tiny_llama
from state_helpers import Oops, as_found, failing, generate, plain, tiny_neox

import hf_paged
from hf_paged.integrations.lean import LeanForward

pytestmark = pytest.mark.usefixtures("paged")


@pytest.fixture(params=["lean", "module"])
def model(request):
    """One model that has a forward of the engine's own, one that has not."""
    return tiny_llama() if request.param == "lean" else tiny_neox()


@pytest.mark.parametrize("error", [Oops, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["processor", "criterion", "streamer", "forward", "prompt forward"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_neox])
def test_an_exception(make, batch, error, place):
    model = make()
    generate(model, batch)  # or the model is found out to fail before there is an engine
    wanted, before = plain(model, batch), as_found(model)
    fail = failing(5 if place != "prompt forward" else 1, error())
    arguments, hook = {}, None
    if place == "processor":
        arguments["logits_processor"] = [lambda ids, scores: fail() or scores]
    elif place == "criterion":
        arguments["stopping_criteria"] = [lambda ids, scores: fail() or False]
    elif place == "streamer":
        arguments["streamer"] = type("Streamer", (), {"put": fail, "end": fail})()
    else:
        layers = model.model.layers if make is tiny_llama else model.gpt_neox.layers
        hook = layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        generate(model, batch, **arguments)
    if hook is not None:
        hook.remove()
    assert as_found(model) == before
    assert_clean(model)
    assert generate(model, batch).tolist() == wanted
    assert_clean(model)


def test_an_exception_reaches_the_caller_as_it_was(model, batch):
    error = Oops("the very one")
    with pytest.raises(Oops) as caught:
        generate(model, batch, logits_processor=[lambda ids, scores: failing(1, error)()])
    assert caught.value is error


def test_one_calls_exception_leaves_another_call_alone(model):
    """Two calls share the engine's steps; the processor of one of them raises."""
    rows = [left_padded(prompts_of(5, 7, seed=i)) for i in range(2)]
    wanted, results = plain(model, rows[0], max_new_tokens=40), {}
    generate(model, rows[0])
    started, over = threading.Event(), threading.Event()

    def slow(ids, scores):
        started.set()
        if ids.shape[1] == 20:
            over.wait(60)
        return scores

    def run():
        results["good"] = generate(model, rows[0], max_new_tokens=40, logits_processor=[slow]).tolist()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(60)
    over.set()
    with pytest.raises(Oops):
        generate(model, rows[1], logits_processor=[lambda ids, scores: failing(1, Oops())()])
    thread.join()
    assert results["good"] == wanted
    assert_clean(model)


OURS = {str(Path(hf_paged.__file__).parent), str(Path(sys.modules[LeanForward.__module__].__file__).parent)}


def interrupted_at(count, function, within=""):
    """Call `function`, with a KeyboardInterrupt where the `count`-th signal could come in our code.

    Python looks for signals when a function begins, and behind each call: a profiler is told of both. Returns whether
    there were that many places, in functions of that name if one is given.
    """
    left = count

    def profile(frame, event, argument):
        nonlocal left
        code = frame.f_code
        if event in ("call", "c_return") and within in code.co_name and code.co_filename.startswith(tuple(OURS)):
            left -= 1
            if not left:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def test_interrupts_anywhere(model, batch):
    settings = dict(max_new_tokens=3, repetition_penalty=1.3, eos_token_id=98)
    wanted = generate(model, batch, **settings).tolist()
    before, chance = as_found(model), random.Random(0)
    last = 1
    while interrupted_at(last, lambda: generate(model, batch, **settings)):
        last *= 2
    for count in [chance.randrange(1, last) for _ in range(60)]:
        interrupted_at(count, lambda: generate(model, batch, **settings))
        assert as_found(model) == before, count
        assert_clean(model)
        if count % 4 == 0:
            assert generate(model, batch, **settings).tolist() == wanted, count
    assert generate(model, batch, **settings).tolist() == wanted


@pytest.mark.parametrize("within", ["__enter__", "_change", "__exit__", "_restore"])
def test_interrupts_while_the_model_is_changed_and_restored(batch, within):
    model = tiny_neox()
    generate(model, batch)
    before = as_found(model)
    for count in range(1, 10):
        assert interrupted_at(count, lambda: generate(model, batch), within)
        assert as_found(model) == before, count
        assert_clean(model)


@pytest.mark.parametrize("place", ["the engine", "its core", "its tree"])
def test_interrupts_between_the_look_at_weights_and_forgetting(batch, monkeypatch, place):
    """KV that was computed with other weights is never used, however often the change was noticed in vain."""
    model = tiny_llama()
    generate(model, batch)
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(4.0)
    engine = engine_of(model)
    owner = {"the engine": engine, "its core": engine.core, "its tree": engine.core.memory.prefixes}[place]
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, "forget", failing(1, KeyboardInterrupt()))
            generate(model, batch)
        assert_clean(model)
    assert generate(model, batch).tolist() == plain(model, batch)
    assert_clean(model)


@pytest.mark.parametrize("make", [tiny_llama, tiny_neox])
def test_interrupts_of_a_first_call(make, batch):
    """While the model is looked at and its engine is made."""
    wanted = plain(make(), batch)
    chance = random.Random(1)
    for _ in range(12):
        model = make()
        before = as_found(model)
        interrupted_at(chance.randrange(1, 4000), lambda: generate(model, batch))  # noqa: B023
        assert as_found(model) == before
        assert generate(model, batch).tolist() == wanted
        assert_clean(model)


def test_interrupts_by_a_signal(model, batch):
    import signal

    wanted, chance = plain(model, batch, max_new_tokens=20), random.Random(2)
    generate(model, batch)
    before = as_found(model)
    for _ in range(12):
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.03))
        try:
            old = signal.signal(signal.SIGALRM, signal.default_int_handler)
            generate(model, batch, max_new_tokens=20)
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert as_found(model) == before
        assert_clean(model)
    assert generate(model, batch, max_new_tokens=20).tolist() == wanted


def test_a_call_inside_a_call(model, batch):
    """A processor that generates with the same model."""
    inner = torch.tensor([[5, 6, 7]])
    wanted = model.generate(inner, max_new_tokens=3).tolist()

    def consult(ids, scores):
        assert model.generate(inner, max_new_tokens=3, cache_implementation="paged").tolist() == wanted
        return scores

    assert generate(model, batch, max_new_tokens=3, logits_processor=[consult]).tolist() == plain(
        model, batch, max_new_tokens=3
    )
    assert_clean(model)
