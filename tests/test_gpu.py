"""The same contract on a CUDA device, and the Triton kernels against the reference there."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_cases import Case, random_case
from kernel_cases import make as make_step
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged import Engine, SamplingParams
from hf_paged.kernels import choose_backend, launch, paged_attention, worklist, write_kv
from hf_paged.kernels.card import target_of
from hf_paged.kernels.fp8 import FP8, narrowed
from hf_paged.kernels.tuned import tiles_of

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


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_captured_steps_give_the_tokens_of_steps_one_by_one(kind):
    prompts = [[1 + (7 * i + j) % 90 for j in range(3 + 5 * i)] for i in range(12)]
    params = [
        SamplingParams(temperature=(0.0, 1.0)[i % 2], top_p=(1.0, 0.9)[i % 3 == 1], max_tokens=9 + 3 * i, seed=i)
        for i in range(12)
    ]
    made = []
    for graphs in (False, True):
        with Engine(make(kind), num_pages=300, max_sequences=7, cuda_graphs=graphs, check=True) as engine:
            made.append([r.outputs[0].token_ids for r in engine.generate(prompts, params, raise_errors=True)])
            assert graphs == (engine.stepper is not None)
            assert engine.stepper is None or (engine.stepper.failure is None and engine.stepper._steps)
    assert made[0] == made[1]


def test_weights_that_are_replaced_are_not_those_that_were_captured():
    model, params = make("llama"), SamplingParams(temperature=0.0, max_tokens=12)
    with Engine(model, num_pages=100, cuda_graphs=True) as engine:
        engine.generate([[5, 6, 7]], params)
        weight = model.model.layers[1].mlp.up_proj.weight
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.flip(0).contiguous())
        del weight
        changed = engine.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
        assert engine.stepper.failure is None  # captured anew
    with Engine(model, num_pages=100, cuda_graphs=False) as engine:
        assert changed == engine.generate([[5, 6, 7]], params)[0].outputs[0].token_ids


def test_pool_is_a_fraction_of_free_memory():
    free = torch.cuda.mem_get_info()[0]
    with Engine(make("llama"), memory_fraction=0.02) as engine:
        held = engine.stats().pages_total * engine.stats().page_bytes
        assert 0.01 * free < held <= 0.021 * free


# -- the kernels

NEAR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
TREE = (-1, -1, 0, 1, 1, 4, 2, -1, 6)
CASES = [
    Case(rows=((0, None), (1300, None), (63, None)), dim=128, value_dim=128, group=4),
    Case(rows=((900, None), (3, None)), page_size=1, group=7, kv_heads=1, dim=96, value_dim=40),
    Case(rows=((700, None), (9, None)), page_size=256, window=133, sinks=True, softcap=2.0, dim=64, value_dim=64),
    Case(rows=((0, 170), (150, 9)), page_size=32, dim=80, group=3, value_dim=80),
    Case(rows=((0, 300), (77, 130)), page_size=16, dim=128, group=4, value_dim=128, window=90),
    Case(rows=((90, 21), (5, 1)), page_size=2, window=7, group=1, kv_heads=3, dim=256, value_dim=256),
    Case(rows=((1600, TREE), (0, TREE[:4])), page_size=64, dim=128, value_dim=128, group=4),
    Case(rows=((60, TREE), (20, TREE[:4]), (9, 3), (40, None)), page_size=4, window=6, softcap=2.0, sinks=True),
    # Many queries, as prefill.py takes them on Hopper: tiles in parts, odd groups, a page a slot, trees beside.
    Case(rows=((5000, 40), (0, 257), (9, 20)), dim=128, group=4, value_dim=128),
    Case(rows=((3100, 70), (0, 33)), dim=64, group=8, value_dim=64, kv_heads=1, sinks=True, window=2500),
    Case(rows=((2300, 45), (1, 131)), dim=128, group=7, value_dim=128, page_size=1, softcap=2.0),
    Case(rows=((1, 300), (290, 129)), dim=64, group=1, value_dim=64, page_size=256, sinks=True, softcap=3.0, window=1),
    Case(rows=((700, TREE * 3), (700, 30), (40, None), (0, 0)), dim=128, group=4, value_dim=128, kv_heads=8),
]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_kernels_equal_the_reference(case, dtype):
    step = make_step(replace(case, dtype=dtype, device="cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        got = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    torch.testing.assert_close(got.cpu().float(), step.expected(), atol=NEAR[dtype], rtol=NEAR[dtype])
    assert choose_backend("auto", "cuda")[0] == "triton"


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype, dim", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 64)])
def test_splits_that_rows_share_change_no_bit(group, dtype, dim, monkeypatch):
    """One program reads them for several rows: with the same products as for one."""
    monkeypatch.setattr(worklist, "LEAST_SHARED", 1)
    lengths = [4200 + 37 * i for i in range(13)] + [2100, 1500]
    case = Case(tuple((length, None) for length in lengths), 16, 2, group, dim, dim, dtype=dtype, device="cuda")
    step = make_step(case)
    for row in range(2, 13):
        step.rows.page_table[row, :250] = step.rows.page_table[row % 2, :250]
    assert worklist.shared_pages(step.rows.page_table, step.rows.context_lens, 16) is not None
    got = [
        paged_attention(step.query, step.keys, step.values, rows, **step.options)
        for rows in (replace(step.rows, grouped=grouped, _derived={}) for grouped in (True, False))
    ]
    assert torch.equal(*got) and bool(got[0].isfinite().all())


@pytest.mark.parametrize("group, page_size", [(4, 16), (3, 32), (8, 1), (5, 256)])
@pytest.mark.parametrize("sinks", [False, True])
def test_few_programs_over_fp8_change_no_bit(group, page_size, sinks, monkeypatch):
    """Here results are kept in float32."""
    from hf_paged.kernels import decode as decode_module

    device = torch.device("cuda")
    if target_of(device).arch != "sm_90":
        pytest.skip("needs a Hopper card")
    merged, merge, chosen = [], decode_module.merge_parts, decode_module.fetches_ahead
    monkeypatch.setattr(decode_module, "merge_parts", lambda *args: (merged.append(1), merge(*args)))
    for lengths in ([31000], [17, 5000], [1, 2049, 1536, 1537], [128, 9000], [3000] * 3):
        case = Case(tuple((n - 1, None) for n in lengths), page_size, 8, group, 128, 128, sinks=sinks)
        step = make_step(replace(case, dtype=torch.bfloat16, device="cuda"))
        pages = [narrowed(part, FP8) for part in (step.keys, step.values)]
        table = torch.from_numpy(step.rows.page_table).to(device, torch.int32).contiguous()
        context = torch.tensor(lengths, dtype=torch.int32, device=device)
        config = tiles_of("decode", launch.head_shape(8 * group, *pages, 2), target_of(device))
        got = []
        for choose in (chosen, lambda *_: False):
            monkeypatch.setattr(decode_module, "fetches_ahead", choose)
            out = torch.full(step.query.shape, torch.nan, device=device)
            arrived = torch.zeros(len(lengths) * 8, dtype=torch.int32, device=device)
            decode_module.decode(
                step.query, *pages, table, context, out, arrived, config, longest=max(lengths), scale=0.1,
                sinks=step.sinks,
            )  # fmt: skip
            got.append(out)
        assert torch.equal(*got) and bool(got[0].isfinite().all()) and not arrived.any()
    assert len(merged) == 5


def test_rollouts_of_one_prompt_are_those_of_one_by_one(monkeypatch):
    """Captured steps that read the prompt's pages once for all of them."""
    monkeypatch.setattr(worklist, "LEAST_SHARED", 1)
    prompt = [1 + (7 * i) % 90 for i in range(2300)]
    params = [SamplingParams(temperature=1.0, max_tokens=24, seed=seed) for seed in range(6)]
    config = LlamaConfig(**{**SIZES, "head_dim": 64}, max_position_embeddings=4096)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    with Engine(model, num_pages=600, page_size=16, check=True) as engine:
        together = [r.outputs[0].token_ids for r in engine.generate([prompt] * 6, params, raise_errors=True)]
        assert any(bucket.shared for bucket in engine.core.stepper._steps)
        alone = [engine.generate([prompt], [one], raise_errors=True)[0].outputs[0].token_ids for one in params]
    assert together == alone


def test_prefill_parts_its_warps_on_hopper(monkeypatch):
    """And gives what it gave, whoever shares the step."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper card")
    from hf_paged.kernels import prefill

    calls, run = [], prefill.prefill
    monkeypatch.setattr(prefill, "prefill", lambda *args, **options: (calls.append(1), run(*args, **options)))
    case = Case(rows=((4000, 60),), dim=128, group=4, value_dim=128, dtype=torch.bfloat16, device="cuda")
    alone, beside = make_step(case), make_step(replace(case, rows=((4000, 60), (50, TREE * 3), (9, 300))))
    n = len(alone.query)
    beside.query[:n] = alone.query
    here, there = (torch.from_numpy(step.rows.page_table[0, : -(-4060 // 16)]).cuda() for step in (alone, beside))
    beside.keys[there], beside.values[there] = alone.keys[here], alone.values[here]
    got = [paged_attention(s.query, s.keys, s.values, s.rows, **s.options)[:n] for s in (alone, beside)]
    assert torch.equal(*got) and len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decode", "extend", "tree", "any"])
def test_many_random_steps(kind):
    for seed in range(25):
        case = random_case(np.random.default_rng(seed), kind, longest=700, dims=(16, 64, 96, 128))
        step = make_step(replace(case, device="cuda"))
        got = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
        torch.testing.assert_close(got.cpu(), step.expected(), atol=2e-5, rtol=2e-5)


def test_new_keys_and_values_are_stored():
    step = make_step(Case(rows=((5, None), (20, 30)), device="cuda", dtype=torch.bfloat16))
    keys, values = step.keys.clone(), step.values.clone()
    key, value = (torch.randn(2, 31, 16, device="cuda").bfloat16().transpose(0, 1) for _ in range(2))
    write_kv(key, value, keys, values, step.rows)
    page, offset = step.rows.slots // 16, step.rows.slots % 16
    step.keys[page, :, offset], step.values[page, :, offset] = key, value
    assert torch.equal(keys.nan_to_num(7.0), step.keys.nan_to_num(7.0))
    assert torch.equal(values.nan_to_num(7.0), step.values.nan_to_num(7.0))
