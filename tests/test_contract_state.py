"""The generate contract, "State": what a call leaves behind, whatever happens in it."""

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from conftest import PAD, assert_clean, assert_equal, engine_of, left_padded, prompts_of, spread, tiny_llama
from state_helpers import Oops, as_found, failing, generate, plain, tiny_neox
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM

import hf_paged
from hf_paged.integrations.inspect import PagedForward

pytestmark = pytest.mark.usefixtures("paged")


@pytest.fixture(params=["lean", "module"])
def model(request):
    """One model that has a forward of the engine's own, one that has not."""
    return tiny_llama() if request.param == "lean" else tiny_neox()


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


def test_a_first_call_in_inference_mode(model, batch):
    with torch.inference_mode():
        generate(model, batch)
    assert generate(model, batch).tolist() == plain(model, batch)
    generate(model, batch, num_beams=2)


def test_autocast(model, batch):
    """Half precision: tokens may differ at near ties. What counts is that calls inside and outside go on."""
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert generate(model, batch).shape == (3, 21)
        assert generate(model, batch).tolist() == plain(model, batch)


def test_gradients_go_on(model, batch):
    with torch.enable_grad():
        out = generate(model, batch, return_dict_in_generate=True, output_scores=True)
        assert torch.is_grad_enabled() and not out.scores[0].requires_grad
    model(input_ids=batch["input_ids"]).logits.sum().backward()
    with torch.inference_mode():
        generate(model, batch)
    assert generate(model, batch).tolist() == plain(model, batch)


# -- changes between calls


def test_another_generation_config(model, batch):
    for settings in (
        {"max_new_tokens": 3},
        {"suppress_tokens": list(range(2, 50))},
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


class OwnForward(LlamaForCausalLM):
    """A model whose class changes what its base computes."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.flip(-1)
        return out


class OwnInputs(LlamaForCausalLM):
    """A model that gives its forward other inputs than its base does."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["input_ids"] = (inputs["input_ids"] + 1) % 99
        return inputs


@pytest.mark.parametrize("kind", [OwnForward, OwnInputs])
def test_code_of_ones_own(batch, ways, kind):
    base = tiny_llama()
    model = kind(base.config).eval()
    model.load_state_dict(base.state_dict())
    model.generation_config = base.generation_config
    result = assert_equal(model, **batch, max_new_tokens=8)
    assert result.tolist() != plain(base, batch)
    assert ways.taken() == ("engine" if kind is OwnForward else "loop")


def test_code_that_is_patched(model, batch, monkeypatch):
    before = generate(model, batch).tolist()
    kind = type(model.model.norm if isinstance(model, LlamaForCausalLM) else model.gpt_neox.final_layer_norm)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x).flip(-1))
    assert generate(model, batch).tolist() == plain(model, batch) != before


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
