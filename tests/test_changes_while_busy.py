"""A model that changes while requests run, in ways that no counter tells of; and names of KV between processes."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama

from hf_paged import Engine, SamplingParams
from hf_paged.integrations.validity import identity

PROMPT, OTHER = [5 * i % 89 + 1 for i in range(40)], [7 * i % 83 + 2 for i in range(30)]


@pytest.fixture
def model():
    return tiny_llama(vocab_size=97, hidden_size=64, intermediate_size=96)


def params(count=6):
    return SamplingParams(temperature=0.0, max_tokens=count)


def tokens(engine, prompt=PROMPT, count=6):
    return list(engine.generate([prompt], params(count))[0].outputs[0].token_ids)


def wanted(model, prompt=PROMPT, count=6):
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def run_out(engine):
    found = []
    while engine.has_work:
        found += engine.step()
    engine.check()
    return found


def switchable(model):
    """An adapter, as far as KV goes: a setting of a module of which nothing else tells. Returns who switches it."""
    layer = model.model.layers[0].mlp
    layer.gain = 1.0
    layer.register_forward_hook(lambda module, given, out: out * module.gain)
    return lambda gain: setattr(layer, "gain", gain)


def test_what_comes_while_others_run_meets_the_model_as_it_is(model):
    switch = switchable(model)
    with Engine(model, page_size=8) as engine:
        tokens(engine)  # its KV is kept
        engine.submit(OTHER, params(40))
        engine.step()
        switch(-2.0)
        late = engine.submit(PROMPT, params())
        found = {output.request_id: list(output.outputs[0].token_ids) for output in run_out(engine)}
        assert found[late if isinstance(late, str) else late.request_id] == wanted(model)
        assert tokens(engine) == wanted(model)


def test_a_hook_that_comes_while_others_run(model):
    with Engine(model, page_size=8) as engine:
        tokens(engine)
        engine.submit(OTHER, params(40))
        engine.step()
        model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * -2.0)
        assert tokens(engine) == wanted(model)
        run_out(engine)


def test_what_another_adapter_left_is_gone_when_the_first_is_back(model):
    switch = switchable(model)
    with Engine(model, page_size=8) as engine:
        tokens(engine, OTHER)
        engine.submit(PROMPT, params())
        switch(-2.0)
        run_out(engine)
        switch(1.0)
        assert tokens(engine) == wanted(model)


@pytest.mark.parametrize("look", ["begin", "step"])
def test_a_cast_ends_what_runs_and_nothing_else(model, look):
    with Engine(model, page_size=8) as engine:
        engine.submit(OTHER, params(40))
        engine.step()
        model.to(torch.float16)
        if look == "step":
            (ended,) = run_out(engine)
            assert "moved or cast" in str(ended.error)
        assert len(tokens(engine)) == 6
        engine.check()


def test_layers_of_which_one_scales_otherwise(model):
    with Engine(model) as engine:
        assert tokens(engine) == wanted(model)
        model.model.layers[1].self_attn.scaling = 0.01
        assert tokens(engine) == wanted(model)


def test_the_name_of_kv_is_that_of_all_numbers(model):
    name = identity(model)
    assert identity(model) == name
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data[3, 5] += 1.0
    assert identity(model) != name
    weight.data[3, 5] -= 1.0
    swapped = weight.data[[1, 0]].clone()
    weight.data[:2] = swapped
    assert identity(model) != name


def test_a_hook_has_no_name_in_another_process(model, tmp_path):
    with Engine(model, page_size=8) as engine:
        tokens(engine)
        path = engine.save_prefixes(tmp_path)
        assert engine.load_prefixes(path) >= 0
        model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * -2.0)
        with pytest.raises(ValueError, match="other weights"):
            engine.load_prefixes(path)
        assert tokens(engine) == wanted(model)


def test_a_disk_tier_gives_nothing_back_behind_forget(model, tmp_path):
    gain = [1.0]
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * gain[0])
    prompts = [[(3 * i + k) % 89 + 1 for i in range(80)] for k in range(3)]
    with Engine(model, page_size=8, num_pages=16, disk_cache=tmp_path) as engine:
        for prompt in prompts * 2:
            tokens(engine, prompt)
        gain[0] = -2.5
        engine.forget()
        assert [tokens(engine, prompt) for prompt in prompts] == [wanted(model, prompt) for prompt in prompts]
