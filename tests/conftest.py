"""What the tests share: tiny random models, the bundled tokenizer, the doors open, and both ways of one call."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import hf_paged
from hf_paged.integrations.registry import REGISTRY

torch.set_num_threads(1)  # tiny tensors: more threads only cost time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins with it ignored

MODELS = Path(__file__).parent.parent / "examples" / "models"
PAD, BOS = 0, 1
LOOP_MESSAGE = "transformers' own loop"
CACHE_MESSAGE = "runs with its own cache"


def spread(model: PreTrainedModel, std: float = 0.3) -> PreTrainedModel:
    """Random weights large enough that greedy tokens vary and logits are far apart; ready for use."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.1 if name.endswith("bias") else 1.0)
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = PAD, BOS
    model.generation_config.eos_token_id = None
    return model.eval()


def tiny_llama(seed: int = 0, vocab_size: int = 99, **settings: Any) -> LlamaForCausalLM:
    """A random Llama of two layers; pads are 0, texts begin with 1, and nothing ends them."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=256) | settings
    config = LlamaConfig(vocab_size=vocab_size, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, **sizes)
    return spread(LlamaForCausalLM(config))


def prompts_of(*lengths: int, vocab_size: int = 99, seed: int = 0) -> list[torch.Tensor]:
    """Random prompts, int64 `[1, length]`, without pads."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (1, n), generator=generator) for n in lengths]


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompts as one batch: `input_ids` and `attention_mask`."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - prompt.shape[1] :] = prompt[0]
        mask[i, longest - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model: PreTrainedModel, **arguments: Any) -> tuple[Any, Any]:
    """What `generate` gives without and with `cache_implementation="paged"`.

    An argument that is a function marked by `fresh` is called for each of the two, for what a call uses up.
    """
    outputs = []
    for extra in ({}, {"cache_implementation": "paged"}):
        made = {k: v.make() if isinstance(v, fresh) else v for k, v in arguments.items()}
        outputs.append(model.generate(**made, **extra))
    return outputs[0], outputs[1]


class fresh:
    """An argument made anew for each call."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def assert_equal(model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
    """Both ways give the same tensor of tokens; returns it."""
    plain, paged = both(model, **arguments)
    assert paged.dtype == plain.dtype and paged.shape == plain.shape, (paged.shape, plain.shape)
    assert paged.tolist() == plain.tolist()
    return paged


def same_error(model: PreTrainedModel, kind: type[Exception] = ValueError, **arguments: Any) -> str:
    """Both ways refuse the call in the same words; returns them."""
    messages = []
    for extra in ({}, {"cache_implementation": "paged"}):
        with pytest.raises(kind) as error:
            model.generate(**arguments, **extra)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    return messages[0]


def engine_of(model: PreTrainedModel) -> Any:
    """The model's engine, or None."""
    return REGISTRY.find(model)


def assert_clean(model: PreTrainedModel) -> None:
    """The model's engine works on nothing, keeps its laws and has all its pages."""
    engine = engine_of(model)
    assert engine is not None
    engine.check()
    stats = engine.stats()
    assert not engine.core.busy and stats.pages_free == stats.pages_total


class Ways:
    """Which way calls went since the last look: "engine", "loop" (transformers' own, paged) or "own cache"."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    def taken(self) -> str:
        messages = [r.getMessage() for r in self.caplog.records if r.name == "hf_paged"]
        self.caplog.clear()
        if any(CACHE_MESSAGE in m for m in messages):
            return "own cache"
        return "loop" if any(m.startswith(LOOP_MESSAGE) for m in messages) else "engine"


@pytest.fixture
def ways(caplog: pytest.LogCaptureFixture) -> Ways:
    caplog.set_level(logging.INFO, logger="hf_paged")
    return Ways(caplog)


@pytest.fixture
def paged() -> Iterator[None]:
    """The doors are open: pages of 4 tokens, every step checked."""
    hf_paged.enable(check=True, page_size=4, num_pages=512)
    yield
    hf_paged.disable()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled model's: 4096 ids, pads on the left."""
    return AutoTokenizer.from_pretrained(MODELS / "target")


@pytest.fixture
def text_model() -> LlamaForCausalLM:
    """A random model over the bundled tokenizer's vocabulary."""
    made = tiny_llama(vocab_size=4096)
    made.generation_config.pad_token_id, made.generation_config.bos_token_id = 1, 0
    return made


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Three prompts of one length."""
    return {"input_ids": torch.cat(prompts_of(6, 6, 6))}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three prompts of several lengths, left-padded."""
    return left_padded(prompts_of(9, 4, 13))


@pytest.fixture(params=["amx", "float32"])
def products(request):
    """Tiles are multiplied as such where the processor has them, and as every other one does it."""
    from hf_paged.kernels.native_tiles import tile_ops

    ops = tile_ops()
    before = ops.by_amx
    if request.param == "amx" and not ops.use_amx(True):
        pytest.skip("the processor does not multiply tiles (AMX)")
    if request.param == "float32":
        ops.use_amx(False)
    yield request.param
    ops.use_amx(before)
