"""Models under `torch.compile`: the engine's own option, and models that a caller compiled."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from tiny_models import ENGINE, make

import hf_paged
from hf_paged import Engine, SamplingParams

PROMPTS = [[1 + (7 * i + j) % 90 for j in range(3 + 5 * i)] for i in range(5)]
PARAMS = [SamplingParams(temperature=(0.0, 1.0)[i % 2], max_tokens=10, seed=i) for i in range(5)]
# Biases and parallel blocks; windows and capped scores; sinks and experts.
STEMS = ("GPTNeoX", "Gemma2", "GptOss")
LEAN = ("Llama", "Mistral", "Qwen2", "Qwen3")  # another forward takes the place of theirs


def answers(model: torch.nn.Module, **options) -> list[list[int]]:
    with Engine(model, num_pages=200, page_size=4, max_batch_tokens=31, check=True, **options) as engine:
        got = [r.outputs[0].token_ids for r in engine.generate(PROMPTS, PARAMS, raise_errors=True)]
        assert engine.forward.compiled is None or engine.forward.compiled.failure is None
    return got


@pytest.fixture
def compiler(monkeypatch):
    """Dynamo, which makes the graphs, without Inductor, which takes long; and what it counted."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **{"backend": "eager"} | options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "stem", [*STEMS, *(pytest.param(s, marks=pytest.mark.long) for s in ENGINE if s not in (*STEMS, *LEAN))]
)
def test_tokens_are_those_without_it(stem, compiler):
    model = make(stem, ENGINE[stem])
    plain = answers(model)
    assert not compiler["frames"]
    assert answers(model, compile=True) == plain
    kinds = len(set(getattr(model.config, "layer_types", None) or [None])) * (1 + (stem == "SmolLM3"))
    assert 1 <= compiler["stats"]["unique_graphs"] <= 2 * kinds  # of one token alone, and of more
    assert not compiler["graph_break"]


def test_drafts_are_verified_by_the_compiled_model(compiler):
    model = make("GPTNeoX", ENGINE["GPTNeoX"])
    speculation = hf_paged.SpeculationConfig(method="suffix", max_draft_tokens=4, tree_width=2)
    assert answers(model, compile=True, speculation=speculation) == answers(model)


def test_blocks_share_a_graph_and_are_left_as_they_were(compiler):
    model = make("GPTNeoX", ENGINE["GPTNeoX"] | {"num_hidden_layers": 5})
    plain = answers(model)
    assert answers(model, compile=True) == plain
    assert compiler["stats"]["unique_graphs"] <= 2
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_fails_is_left_as_it_was(compiler, monkeypatch):
    model = make("GPTNeoX", ENGINE["GPTNeoX"])
    with Engine(model, num_pages=200, compile=True) as engine:
        monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(PROMPTS[:1], PARAMS[:1], raise_errors=True)
        monkeypatch.undo()
        assert not any("forward" in vars(module) for module in model.modules())
        assert engine.forward.compiled.failure is None


def test_forwards_that_someone_replaced_are_run(compiler):
    """As device hooks do: then the model is compiled as a whole."""
    model = make("GPTNeoX", ENGINE["GPTNeoX"])
    plain, calls = answers(model), []
    for block in model.gpt_neox.layers:
        own = block.forward
        block.forward = lambda *args, _own=own, **kwargs: (calls.append(1), _own(*args, **kwargs))[1]
    assert answers(model, compile=True) == plain and calls
    assert all("forward" in vars(block) for block in model.gpt_neox.layers)


def test_two_models_at_once(compiler):
    models = [make("GPTNeoX", ENGINE["GPTNeoX"], seed) for seed in range(2)]
    plain = [answers(model) for model in models]
    engines = [Engine(model, num_pages=200, compile=True) for model in models]
    for _ in range(2):
        for engine, wanted in zip(engines, plain, strict=True):
            assert [r.outputs[0].token_ids for r in engine.generate(PROMPTS, PARAMS, raise_errors=True)] == wanted
    for engine in engines:
        engine.close()


def test_weights_that_change_are_seen(compiler):
    model = make("GPTNeoX", ENGINE["GPTNeoX"])
    with Engine(model, num_pages=200, compile=True) as engine:
        engine.generate(PROMPTS, PARAMS, raise_errors=True)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        got = [r.outputs[0].token_ids for r in engine.generate(PROMPTS, PARAMS, raise_errors=True)]
    assert got == answers(model)


def test_a_compiler_that_fails(monkeypatch):
    """One warning with the reason; tokens come all the same."""

    def broken(function, **options):
        def run(*args, **kwargs):
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = make("GPTNeoX", ENGINE["GPTNeoX"])
    plain = answers(model)
    with Engine(model, num_pages=200, compile=True) as engine:
        with pytest.warns(RuntimeWarning, match="runs as it is .*no C.. compiler"):
            got = [r.outputs[0].token_ids for r in engine.generate(PROMPTS, PARAMS, raise_errors=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.generate(PROMPTS, PARAMS, raise_errors=True)
    assert got == plain


def test_a_model_that_its_caller_compiled(compiler):
    model = make("GPTNeoX", ENGINE["GPTNeoX"])
    ids = torch.tensor(PROMPTS[2])[None]
    plain = model.generate(ids, max_new_tokens=9, do_sample=False)
    model.compile(backend="eager")
    hf_paged.enable(num_pages=200, check=True)
    try:
        assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False, cache_implementation="paged"), plain)
    finally:
        hf_paged.disable()
    assert not compiler["graph_break"]


def test_a_bad_value_is_refused():
    with pytest.raises(ValueError, match="compile='yes'.*True or False"):
        hf_paged.EngineConfig(compile="yes")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("stem", STEMS)
def test_inductor(stem):
    torch._dynamo.reset()
    model = make(stem, ENGINE[stem])
    assert answers(model, compile=True) == answers(model)
