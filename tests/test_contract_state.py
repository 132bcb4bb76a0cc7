"""The generate contract, "State": what a call leaves behind, whatever happens in it."""

import copy
import gc
import pickle
import random
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from conftest import PAD, assert_clean, assert_equal, engine_of, left_padded, prompts_of, spread, tiny_llama
from torch import nn
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

import hf_paged
from hf_paged.integrations.inspect import PagedForward
from hf_paged.integrations.lean import LeanForward

pytestmark = pytest.mark.usefixtures("paged")


def tiny_neox(seed=0, **settings):
    """A model that the engine runs through its own forward."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return spread(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=256, **settings)))


@pytest.fixture(params=["lean", "module"])
def model(request):
    """One model that has a forward of the engine's own, one that has not."""
    return tiny_llama() if request.param == "lean" else tiny_neox()


@pytest.fixture
def batch():
    return left_padded(prompts_of(9, 4, 13))


def generate(model, batch, **settings):
    return model.generate(**batch, **{"max_new_tokens": 8, "cache_implementation": "paged", **settings})


def plain(model, batch, **settings):
    return model.generate(**batch, **{"max_new_tokens": 8, **settings}).tolist()


def as_found(model):
    """Everything about a model that a call might change."""
    modules = dict(model.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "attention": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
    }


class Oops(Exception):
    pass


def failing(after, error):
    """A function that raises `error` when it is called for the `after`-th time."""
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise error

    return fail


# -- as found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_as_found(model, batch, implementation):
    model.set_attn_implementation(implementation)
    wanted = plain(model, batch)
    model.train()
    for module in list(model.modules())[::3]:
        module.training = False
    before = as_found(model)
    assert generate(model, batch).tolist() == wanted
    assert as_found(model) == before
    generate(model, batch, num_beams=2)
    generate(model, batch, do_sample=True, return_dict_in_generate=True)
    assert as_found(model) == before
    assert_clean(model)


def test_dropout_is_off_while_it_generates(batch):
    model = tiny_neox(hidden_dropout=0.5, attention_dropout=0.5)
    wanted = plain(model, batch)
    model.train()
    assert generate(model, batch).tolist() == wanted
    assert model.training


def test_the_callers_objects_are_as_found(model, batch):
    config = GenerationConfig(
        max_new_tokens=4, cache_implementation="paged", cache_config={"page_size": 8}, pad_token_id=PAD
    )
    before = config.to_dict()
    tensors = {name: tensor.clone() for name, tensor in batch.items()}
    given = {"logits_processor": [], "stopping_criteria": [lambda ids, scores: False]}
    lengths = {name: len(value) for name, value in given.items()}
    model.generate(**batch, generation_config=config, **given)
    assert config.to_dict() == before
    assert all(torch.equal(batch[name], tensor) for name, tensor in tensors.items())
    assert {name: len(value) for name, value in given.items()} == lengths


def test_gradients_go_on(model, batch):
    with torch.enable_grad():
        out = generate(model, batch, return_dict_in_generate=True, output_scores=True)
        assert torch.is_grad_enabled() and not out.scores[0].requires_grad
    model(input_ids=batch["input_ids"]).logits.sum().backward()
    with torch.inference_mode():
        generate(model, batch)
    assert generate(model, batch).tolist() == plain(model, batch)


# -- exceptions


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


def interrupted_at(count, function):
    """Call `function`, with a KeyboardInterrupt where the `count`-th signal could come in our code.

    Python looks for signals when a function begins, and behind each call: a profiler is told of both. Returns whether
    there were that many places.
    """
    left = count

    def profile(frame, event, argument):
        nonlocal left
        if event in ("call", "c_return") and any(frame.f_code.co_filename.startswith(place) for place in OURS):
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


# -- changes between calls


def test_another_generation_config(model, batch):
    for settings in (
        {"max_new_tokens": 3},
        {"repetition_penalty": 2.0},
        {"eos_token_id": 7},
        {"min_new_tokens": 5},
        {},
    ):
        assert_equal(model, **batch, **{"max_new_tokens": 9, **settings})
    for config in (GenerationConfig(max_new_tokens=2), GenerationConfig(max_new_tokens=6, suppress_tokens=[3, 4])):
        config.pad_token_id = PAD
        assert generate(model, batch, generation_config=config, max_new_tokens=None).tolist() == plain(
            model, batch, generation_config=config, max_new_tokens=None
        )
    model.generation_config.max_new_tokens = 4
    assert_equal(model, **batch)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition that can be switched."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active = base, True
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 3 if self.active else self.base(x)


def changes(model):
    """Ways to change the weights, in order; each is done when it is yielded."""
    layers = model.model.layers if isinstance(model, LlamaForCausalLM) else model.gpt_neox.layers
    mlp = layers[0].mlp
    name = "up_proj" if hasattr(mlp, "up_proj") else "dense_h_to_4h"
    linear = getattr(mlp, name)
    linear.weight.data.mul_(1.7)
    yield "mul_"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
    optimizer.step()
    yield "optimizer.step"
    other = type(model)(model.config)
    spread(other)
    model.load_state_dict(other.state_dict())
    yield "load_state_dict"
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    yield "another parameter"
    model.get_input_embeddings().weight.data.copy_(torch.randn_like(model.get_input_embeddings().weight))
    yield "embeddings"
    adapter = Adapter(linear)
    setattr(mlp, name, adapter)
    yield "an adapter"
    adapter.active = False
    yield "an adapter that is switched off"
    adapter.active = True
    adapter.up.weight.data.mul_(2)
    yield "an adapter that has learned"
    setattr(mlp, name, adapter.base)
    yield "no adapter"
    linear.register_forward_hook(lambda module, args, output: output * 1.5)
    yield "a hook"
    model.resize_token_embeddings(104)
    spread(model)
    yield "a larger vocabulary"


def test_weights_that_change(model, batch):
    seen = [generate(model, batch, max_new_tokens=12).tolist()]
    for name in changes(model):
        now = generate(model, batch, max_new_tokens=12).tolist()
        assert now == plain(model, batch, max_new_tokens=12), name
        seen.append(now)
        assert_clean(model)
    assert len({str(tokens) for tokens in seen}) > len(seen) // 2  # most changes show in the tokens


def test_weights_that_change_within_a_call(model, batch):
    """As in `generate`: the next step uses them."""
    weight = model.get_output_embeddings().weight

    def train(ids, scores):
        weight.data.neg_()
        return scores

    row = {"input_ids": batch["input_ids"][2:]}
    wanted = plain(model, row, logits_processor=[train])
    assert generate(model, row, logits_processor=[train]).tolist() == wanted


# -- threads


@pytest.mark.parametrize("settings", [[{}], [{"page_size": 4}, {"page_size": 8}]])
def test_threads(model, settings):
    batches = [left_padded(prompts_of(3 + i, 8 - i, seed=i)) for i in range(4)]
    wanted = [plain(model, batch, max_new_tokens=12) for batch in batches]
    results, errors, before = {}, [], as_found(model)
    barrier = threading.Barrier(len(batches) + 1)

    def run(i):
        try:
            barrier.wait(60)
            for turn in range(3):
                config = settings[(i + turn) % len(settings)]
                results[i, turn] = generate(model, batches[i], max_new_tokens=12, cache_config=config).tolist()
        except Exception as error:
            errors.append(error)

    def run_plain():
        try:
            barrier.wait(60)
            for turn in range(3):
                results[-1, turn] = plain(model, batches[-1], max_new_tokens=12)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    threads.append(threading.Thread(target=run_plain))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(result == wanted[i] for (i, _), result in results.items()) and len(results) == 15
    assert as_found(model) == before
    assert_clean(model)


def test_threads_draw_what_they_would_alone(model, batch):
    """A seed is drawn when a call begins: what runs beside it changes nothing."""
    torch.manual_seed(4)
    wanted = generate(model, batch, do_sample=True).tolist()
    inside, results = threading.Event(), []

    def other():
        generate(model, batch, max_new_tokens=30, logits_processor=[lambda ids, scores: inside.set() or scores])

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    torch.manual_seed(4)
    results.append(generate(model, batch, do_sample=True).tolist())
    thread.join()
    assert results == [wanted]


# -- a model that was used


def test_copies_and_files(model, batch, tmp_path):
    wanted = generate(model, batch).tolist()
    twin = copy.deepcopy(model)
    assert engine_of(twin) is None
    assert generate(twin, batch).tolist() == wanted and engine_of(twin) is not engine_of(model)
    again = pickle.loads(pickle.dumps(model))
    assert generate(again, batch).tolist() == wanted
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert generate(loaded, batch).tolist() == wanted
    assert not any("hf_paged" in file.read_text() for file in tmp_path.glob("*.json"))


def test_another_dtype(model, batch):
    generate(model, batch)
    model.to(torch.bfloat16)
    assert generate(model, batch).shape == (3, 21)
    assert engine_of(model).store.dtype == torch.bfloat16
    model.to(torch.float32)
    assert generate(model, batch).tolist() == plain(model, batch)
    model.to("cpu")
    assert generate(model, batch).tolist() == plain(model, batch)
    model.double()
    assert generate(model, batch).tolist() == plain(model, batch)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_neox])
def test_a_model_is_freed_with_its_engine(make, batch, fails):
    model = make()
    generate(model, batch, return_dict_in_generate=True, output_scores=True)
    if fails:
        with pytest.raises(Oops):
            generate(model, batch, logits_processor=[lambda ids, scores: failing(1, Oops())()])
    held = [weakref.ref(model), weakref.ref(engine_of(model)), weakref.ref(engine_of(model).store.keys[0])]
    del model
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


def test_a_call_leaves_no_copies_behind(model, batch):
    """Tensors of a result go with it, not with the next garbage collection."""
    generate(model, batch)
    gc.collect()
    gc.disable()
    try:
        out = generate(model, batch, return_dict_in_generate=True, output_logits=True)
        held = [weakref.ref(out.past_key_values.layers[0].keys), weakref.ref(out.logits[3])]
        del out
        assert [reference() for reference in held] == [None] * 2
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_grows_as_used(batch):
    hf_paged.enable()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    generate(tiny_llama(), batch)
    model = tiny_llama()
    before = resident()
    generate(model, batch)
    store = engine_of(model).store
    assert store.num_pages * store.bytes_per_page > 1 << 28  # a limit, not an expense
    assert resident() - before < 32 << 20


def test_which_forward_runs(batch):
    """The two models of these tests are the two kinds of forward."""
    for make, kind in ((tiny_llama, "LeanForward"), (tiny_neox, "ModuleForward")):
        model = make()
        generate(model, batch)
        forward = engine_of(model).forward
        assert isinstance(forward, PagedForward) and type(forward.run).__name__ == kind
