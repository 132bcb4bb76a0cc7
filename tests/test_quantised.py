"""Quantised models, as transformers loads them: the engine's tokens are those of `generate` with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import engine_of, left_padded, prompts_of, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_paged import Engine, SamplingParams
from hf_paged.integrations.attention import ModuleForward
from hf_paged.integrations.lean import LeanForward
from hf_paged.integrations.validity import Fingerprint


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def quanto() -> Any:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.fixture(scope="module", params=[torchao, quanto], ids=lambda make: make.__name__)
def model(request, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    config, path = request.param(), tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config).eval()


@pytest.mark.usefixtures("paged")
def test_generate(model):
    batch = left_padded(prompts_of(5, 9, 2))
    own = model.generate(**batch, max_new_tokens=12)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, cache_implementation="paged"), own)
    assert isinstance(engine_of(model).forward.run, ModuleForward)  # its linear layers are called, not read


def test_engine_and_a_changed_scale(model):
    engine = Engine(model, num_pages=64)
    prompt = prompts_of(7)[0]

    def both() -> tuple[list[int], list[int]]:
        result = engine.generate([prompt[0].tolist()], SamplingParams(temperature=0.0, max_tokens=12))[0]
        return result.outputs[0].token_ids, model.generate(prompt, max_new_tokens=12)[0, 7:].tolist()

    before, own = both()
    assert before == own
    weight = model.model.layers[0].mlp.up_proj.weight
    scale = next(getattr(weight, name) for name in ("scale", "_scale") if hasattr(weight, name))
    scale.data.mul_(4)
    after, own = both()
    assert after == own and after != before


class Halves(torch.Tensor):
    """A weight that is not what its memory says: only its own code knows what it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None


def test_weights_of_a_kind_of_their_own_are_not_read_by_the_lean_forward():
    model = tiny_llama()
    engine = Engine(model, num_pages=16)
    assert isinstance(engine.forward.run, LeanForward)
    layer = model.model.layers[0].mlp.up_proj
    layer._parameters["weight"] = torch.Tensor._make_subclass(Halves, layer.weight.detach())
    assert LeanForward.build(model, engine.store) is None


def test_parts_of_such_weights_are_watched():
    layer = nn.Linear(8, 8)
    layer._parameters["weight"] = torch.Tensor._make_subclass(Halves, torch.zeros(8, 8))
    layer.weight.numbers = torch.ones(8, dtype=torch.int8)
    before = Fingerprint(layer)
    assert before == Fingerprint(layer)
    layer.weight.numbers.data[3] = 2
    assert before != Fingerprint(layer)
