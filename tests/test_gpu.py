"""The same contract on a CUDA device: the torch path is right there, if not yet fast."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged import Engine, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.3,
    eos_token_id=None,
    pad_token_id=0,
)


def make(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES) if kind == "llama" else Gemma2Config(**SIZES, sliding_window=8)
    model_class = LlamaForCausalLM if kind == "llama" else Gemma2ForCausalLM
    return model_class(config).to("cuda", dtype).eval()


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: tokens are compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    hf_paged.enable(num_pages=200, page_size=4, check=True)
    yield
    hf_paged.disable()
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_greedy_left_padded(kind):
    model = make(kind)
    ids = torch.randint(1, 97, (3, 12), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :5], ids[1, :5] = 0, 0
    options = dict(attention_mask=mask, max_new_tokens=24, do_sample=False)
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="paged", **options), plain)


def test_beams_over_paged_cache():
    model = make("llama")
    ids = torch.randint(1, 97, (2, 9), device="cuda")
    plain = model.generate(ids, max_new_tokens=16, num_beams=3)
    cache = hf_paged.PagedCache(model.config, page_size=4)
    assert torch.equal(model.generate(ids, max_new_tokens=16, num_beams=3, past_key_values=cache), plain)
    cache.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_alone_equals_in_a_batch(dtype):
    with Engine(make("llama", dtype), num_pages=300, page_size=16, max_batch_tokens=64, check=True) as engine:
        prompts = [[1 + (7 * i + j) % 90 for j in range(3 + 5 * i)] for i in range(12)]
        params = [SamplingParams(temperature=1.0, top_p=0.9, max_tokens=20, seed=i) for i in range(12)]
        together = [r.outputs[0].token_ids for r in engine.generate(prompts, params, raise_errors=True)]
        assert all(len(tokens) == 20 for tokens in together)
        if dtype == torch.float32:
            alone = [engine.generate([p], q)[0].outputs[0].token_ids for p, q in zip(prompts, params, strict=True)]
            assert alone == together


def test_pool_is_a_fraction_of_free_memory():
    free = torch.cuda.mem_get_info()[0]
    with Engine(make("llama"), memory_fraction=0.02) as engine:
        held = engine.stats().pages_total * engine.stats().page_bytes
        assert 0.01 * free < held <= 0.021 * free
