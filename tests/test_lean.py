"""The lean forward: the same tokens whatever its parts are made of, and no stale copy of a weight."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_paged import Engine, SamplingParams
from hf_paged.integrations import few, lean
from hf_paged.integrations.linear import OneDnnLinear, PackedLinear
from hf_paged.kernels.native import native_ops
from hf_paged.kernels.native_products import FEW, ProductOps

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)
PROMPTS = [[3, 5, 8, 13], [21] * 9, [2, 4, 6]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if kind == "llama":
        return tiny_llama(head_dim=8)
    config, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    return model_class(config(**SIZES)).eval()


def tokens(engine: Engine) -> list[list[int]]:
    return [r.outputs[0].token_ids for r in engine.generate(PROMPTS, GREEDY, raise_errors=True)]


def alone(model: torch.nn.Module) -> list[list[int]]:
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


@pytest.fixture(autouse=True)
def some_steps_are_long(monkeypatch):
    """As for models that are not small: steps of more lines take a matrix library's products."""
    monkeypatch.setattr(ProductOps, "most", lambda self, nbytes: FEW)


@pytest.fixture
def packs_at_once(monkeypatch):
    if not isinstance(lean.linear_backend(torch.zeros(1)), OneDnnLinear):
        pytest.skip("this torch has no oneDNN products")
    monkeypatch.setattr(lean, "PACK_AFTER", 0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_tokens_are_the_models(kind, backend, packs_at_once):
    model = make(kind)
    with Engine(model, backend=backend, num_pages=64, page_size=4) as engine:
        assert tokens(engine) == alone(model)
        assert isinstance(engine.forward.run, lean.LeanForward)
        assert isinstance(engine.forward.run.ops, PackedLinear)
        assert hasattr(engine.forward.run.between, "ops") == (backend == "auto" and native_ops() is not None)


@pytest.mark.parametrize("change", ["data", "in place", "replaced"])
def test_no_stale_copy_in_the_next_call(change, packs_at_once):
    model = make("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        before = tokens(engine)
        layer = model.model.layers[0].mlp.down_proj
        with torch.no_grad():
            if change == "data":
                layer.weight.data.mul_(-2)
            elif change == "in place":
                layer.weight.mul_(-2)
            else:
                layer.weight = torch.nn.Parameter(layer.weight * -2)
        after = tokens(engine)
        assert after == alone(model) and after != before


def test_copies_are_dropped_when_a_weight_changes_between_steps(packs_at_once):
    model = make("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        for i in range(FEW + 1):  # fewer lines are computed with the weights themselves
            engine.submit([30 + i, 5], GREEDY)
        engine.step()
        packed = engine.forward.run.ops
        assert isinstance(packed, PackedLinear) and packed.current()
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.mul_(2)
        assert not packed.current()
        engine.step()
        assert engine.forward.run.ops is not packed


def test_large_models_are_not_copied(packs_at_once, monkeypatch):
    monkeypatch.setattr(lean, "PACK_BYTES", 10)
    with Engine(make("llama"), num_pages=64, page_size=4) as engine:
        tokens(engine)
        assert not isinstance(engine.forward.run.ops, PackedLinear)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("angles", ["given", "computed"])
def test_a_call_for_a_forward_gives_what_a_call_an_op_does(kind, angles, monkeypatch):
    """Bit for bit, for a step of few lines, where it is given the rotation's angles: it rounds them in its own way."""
    model = make(kind)
    if angles == "given":
        monkeypatch.setattr(few, "_frequencies", lambda rotary: None)
    with Engine(model, num_pages=64, page_size=4) as engine:
        run, steps = engine.forward.run, []
        if run.blocks is None:
            pytest.skip("there are no compiled ops")

        engine.core.stepper = None  # whose steps make no plans

        def both(plan):
            fits, run.blocks = run.blocks, None
            apart, run.blocks = run(plan), fits
            whole = run(plan)
            steps.append(plan.tokens)
            assert (
                torch.equal(whole, apart) if angles == "given" else torch.allclose(whole, apart, rtol=1e-4, atol=1e-5)
            )
            return whole

        monkeypatch.setattr(engine.core, "forward", both)
        assert tokens(engine) == alone(model)
        assert min(steps) <= FEW < max(steps)
        assert run.blocks.fit(run)


def test_weights_that_do_not_lie_in_lines(monkeypatch):
    """The op for all blocks is not for them; the tokens are right."""
    model = make("llama")
    layer = model.model.layers[1].mlp.gate_proj
    with Engine(model, num_pages=64, page_size=4) as engine:
        before = tokens(engine)
        layer.weight.data = layer.weight.data.t().contiguous().t()
        assert tokens(engine) == before
        run = engine.forward.run
        assert run.blocks is None or not run.blocks.fit(run)


def test_the_forward_is_made_anew_only_where_the_model_changed():
    model = make("llama")
    with Engine(model, num_pages=64, page_size=4) as engine:
        tokens(engine)
        first, known = engine.forward.run, engine.validity.known
        tokens(engine)
        assert engine.forward.run is first and engine.validity.known is known
        layer = model.model.layers[1].mlp.up_proj
        for hang in (layer.register_full_backward_hook, layer.register_forward_pre_hook):
            handle = hang(lambda *given: None)
            tokens(engine)
            assert not isinstance(engine.forward.run, lean.LeanForward)  # its own forward runs, with the hook
            handle.remove()
            tokens(engine)
            assert isinstance(engine.forward.run, lean.LeanForward)
        model.config.rms_norm_eps *= 2  # whatever it is for
        second = engine.forward.run
        tokens(engine)
        assert engine.forward.run is not second


def test_what_the_samples_of_an_unchanged_model_do_not_see():
    """A new tensor behind an old parameter, a parameter of the same numbers, and numbers that were changed in place."""
    model = make("llama")
    weight = model.model.layers[0].self_attn.k_proj
    with Engine(model, num_pages=64, page_size=4) as engine:
        tokens(engine)
        for change in (
            lambda: setattr(weight.weight, "data", weight.weight.data.clone()),
            lambda: setattr(weight, "weight", torch.nn.Parameter(weight.weight.detach().clone())),
            lambda: weight.weight.data.mul_(-1.5),
        ):
            known = engine.validity.known
            change()
            assert tokens(engine) == alone(model) and engine.validity.known is not known


def test_a_weight_in_pieces_is_not_looked_at_where_its_copy_was():
    model = make("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.data = layer.weight.data.t().contiguous().t()
    with Engine(model, num_pages=64, page_size=4) as engine:
        engine.submit([3, 5, 8], GREEDY)
        engine.step()
        assert engine.validity.known.many is None and engine.validity.known.few.held
        assert not engine.validity.step()
        assert tokens(engine) == alone(model)
        layer.weight.data.mul_(-1.5)
        assert tokens(engine) == alone(model)
