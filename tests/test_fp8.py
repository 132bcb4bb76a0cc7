"""KV in 8 bits: what is stored, what attention makes of it by every path, and engines that hold it."""

import os
from dataclasses import replace

import interpreter  # noqa: F401  (before Triton is imported)
import numpy as np
import pytest
import torch
from conftest import left_padded, prompts_of, tiny_llama
from interpreter import exact_products  # noqa: F401  (a fixture)
from kernel_cases import Case, Step, make, random_case

import hf_paged
from hf_paged import Engine, SamplingParams
from hf_paged.kernels import paged_attention, write_kv
from hf_paged.kernels.fp8 import FP8, LARGEST, all_finite, narrowed, raw
from hf_paged.prefix_files import PrefixFileRefused
from hf_paged.store import KVStore, LayerShape

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [p[0].tolist() for p in prompts_of(40, 3, 61, 17)]
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
triton = pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=triton)])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def in_fp8(step: Step, backend: str) -> tuple[Step, Step]:
    """The step over pages in fp8, and over pages that hold the same numbers in float32."""
    pages = [narrowed(part, FP8) for part in (step.keys, step.values)]
    wide = replace(step, keys=pages[0].float(), values=pages[1].float())
    return replace(step, keys=pages[0], values=pages[1], rows=replace(step.rows, backend=backend)), wide


# -- numbers


def test_rounding_is_within_a_sixteenth():
    x = torch.cat([torch.randn(10_000), torch.logspace(-12, 2.6, 5_000)])
    error = (narrowed(x, FP8).float() - x).abs()
    assert bool((error <= torch.maximum(x.abs() / 16, torch.tensor(2.0**-10))).all())


def test_what_is_too_large_becomes_the_largest_and_nan_stays():
    got = narrowed(torch.tensor([1e4, -torch.inf, torch.nan, 0.0]), FP8).float()
    assert got[:2].tolist() == [LARGEST, -LARGEST] and bool(got[2].isnan()) and got[3] == 0
    assert not all_finite(narrowed(torch.tensor([1.0, torch.nan]), FP8))
    assert all_finite(narrowed(torch.tensor([1.0, -torch.inf]), FP8))


@backends
def test_keys_and_values_are_stored_rounded(backend):
    step = make(Case(rows=((5, 7), (0, 3)), page_size=4, kv_heads=3, dim=20))
    gen = torch.Generator().manual_seed(1)
    tokens = step.rows.slots.shape[0]
    key, value = (torch.randn(tokens, 3, dim, generator=gen) * 200 for dim in (20, 16))
    key[0, 0, 0], value[-1, 2, 3] = torch.nan, -torch.inf
    pages = [torch.zeros_like(part, dtype=FP8) for part in (step.keys, step.values)]
    write_kv(key, value, *pages, replace(step.rows, backend=backend))
    page, offset = np.divmod(step.rows.slots.numpy(), 4)
    for new, stored in zip((key, value), pages, strict=True):
        assert torch.equal(raw(stored)[page, :, offset], raw(narrowed(new, FP8)))
        assert int((raw(stored) != 0).sum()) <= new.numel()


# -- attention


@backends
@pytest.mark.parametrize("seed", range(6))
def test_attention_reads_what_is_stored(backend, seed):
    case = random_case(np.random.default_rng(seed), longest=50, dims=(8, 16, 20))
    if backend == "torch":  # reads whole pages: what no query sees is finite there, as the store keeps it
        step = make(case)
        step = replace(step, keys=step.keys.nan_to_num(0.5), values=step.values.nan_to_num(0.5))
    else:
        step = make(case)
    narrow, wide = in_fp8(step, backend)
    got = paged_attention(narrow.query, narrow.keys, narrow.values, narrow.rows, **narrow.options)
    torch.testing.assert_close(got, wide.expected(), atol=2e-5, rtol=2e-5)


@triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims, window", [((64, 64), None), ((16, 128), 20), ((128, 32), 9)])
def test_half_precision_over_fp8(dtype, dims, window):
    """By warps that share tiles: values come in pairs of elements. Queries over what float16 holds are held at it."""
    rows = tuple((before, None) for before in (0, 33, 150, 64))
    case = Case(rows, 16, group=3, dim=dims[0], value_dim=dims[1], window=window, sinks=True, dtype=dtype)
    narrow, wide = in_fp8(make(case), "triton")
    got = paged_attention(narrow.query, narrow.keys, narrow.values, narrow.rows, **narrow.options)
    near = 1e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(got.float(), wide.expected(), atol=near, rtol=near)
    if dtype == torch.bfloat16:
        narrow.query[1] *= 1e6
        narrow.query[2] = torch.nan
        got = paged_attention(narrow.query, narrow.keys, narrow.values, narrow.rows, **narrow.options)
        assert bool(got[[0, 1, 3]].isfinite().all()) and bool(got[2].isnan().all())


@triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "group, sinks, page_size", [(4, False, 16), (3, True, 4), (4, True, 256), (8, True, 16), (5, False, 256)]
)
def test_few_programs_give_what_many_do(dtype, group, sinks, page_size, exact_products, monkeypatch):  # noqa: F811
    """They read both halves of a split at once or two tiles, and another kernel merges: the same sums, to the bit."""
    from hf_paged.kernels import decode as module
    from hf_paged.kernels import triton_path

    def smaller(*args):
        return replace(tiles_of(*args), block_n=32, split=64)

    tiles_of, merged = triton_path.tiles_of, []
    merge = module.merge_parts
    monkeypatch.setattr(triton_path, "tiles_of", smaller)
    monkeypatch.setattr(module, "merge_parts", lambda *args: (merged.append(1), merge(*args)))
    rows = tuple((before, None) for before in (0, 33, 150, 1250, 64))
    case = Case(rows, page_size, group=group, dim=128, value_dim=128, sinks=sinks, dtype=dtype)
    narrow, wide = in_fp8(make(case), "triton")
    narrow.query[1] = torch.nan
    given = narrow.query, narrow.keys, narrow.values, narrow.rows
    few = paged_attention(*given, **narrow.options)
    assert len(merged) == 1
    monkeypatch.setattr(module, "fetches_ahead", lambda *_: False)
    many = paged_attention(*given, **narrow.options)
    assert len(merged) == 1 and torch.equal(few.isnan(), many.isnan()) and bool(few[1].isnan().all())
    assert torch.equal(few.nan_to_num(), many.nan_to_num())
    near = 1e-2 if dtype == torch.bfloat16 else 2e-3
    others = [0, 2, 3, 4]
    torch.testing.assert_close(few.float()[others], wide.expected()[others], atol=near, rtol=near)


def test_tokens_of_this_step_are_read_as_they_are_stored():
    """However a prompt is cut into steps."""
    step = make(Case(rows=((0, 9),), page_size=4))
    narrow, wide = in_fp8(replace(step, keys=step.keys.nan_to_num(0), values=step.values.nan_to_num(0)), "auto")
    fresh = tuple(torch.full((9, 2, 16), 99.0) for _ in range(2))
    got = paged_attention(narrow.query, narrow.keys, narrow.values, narrow.rows, **narrow.options, fresh=fresh)
    torch.testing.assert_close(got, wide.expected(), atol=2e-5, rtol=2e-5)


@triton
def test_a_bad_dtype_is_refused():
    step, _ = in_fp8(make(Case(rows=((3, None),))), "triton")
    with pytest.raises(ValueError, match="query.dtype"):
        paged_attention(step.query.double(), step.keys, step.values, step.rows, **step.options)


# -- the store


def test_pages_are_copied_moved_and_wiped():
    store = KVStore([LayerShape(2, 4, 4)] * 2, 6, 4, FP8)
    for tensor in (*store.keys, *store.values):
        raw(tensor)[1] = torch.randint(1, 100, tensor[1].shape, dtype=torch.uint8)
    assert store.bytes_per_page * 4 == KVStore([LayerShape(2, 4, 4)] * 2, 6, 4).bytes_per_page
    from hf_paged.memory import PageCopy

    store.copy([PageCopy(1, 3, 4)])
    store.move(np.array([4, 5]), np.array([8, 9]))
    first = raw(store.keys[1])
    assert torch.equal(first[3], first[1]) and torch.equal(first[2, :, :2], first[1, :, :2])
    raw(store.values[0])[2, 0, 0, 0] = 0x7F
    assert store.finite([1, 3]) and not store.finite([2])
    store.clear(np.array([8]))
    assert store.finite([2])
    store.scrub([1, 2, 3])
    assert not any(raw(tensor).any() for tensor in (*store.keys, *store.values))


# -- engines


def scores(model, **settings) -> torch.Tensor:
    with Engine(model, check=True, kv_dtype="fp8", **settings) as engine:
        found = engine.score([p[:1] for p in PROMPTS], [[p[1:]] for p in PROMPTS])
        engine.check()
    return torch.tensor([one.logprob for (one,) in found])


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 7}, {"backend": "torch"}, {"page_size": 1}, {"lean": False}])
def test_scores_do_not_depend_on_steps_or_paths(model, settings, monkeypatch):
    wanted = scores(model, prefix_caching=False)
    if not settings.pop("lean", True):
        monkeypatch.setattr("hf_paged.integrations.lean.LeanForward.build", lambda *args: None)
    # A sum rounded otherwise may round a key to its neighbour: not as near as float32.
    torch.testing.assert_close(scores(model, **settings), wanted, atol=2e-2, rtol=0)


def test_scores_are_near_those_of_whole_numbers(model):
    with Engine(model) as engine:
        found = engine.score([p[:1] for p in PROMPTS], [[p[1:]] for p in PROMPTS])
    whole = torch.tensor([one.logprob for (one,) in found])
    gap = (scores(model) - whole).abs() / torch.tensor([len(p) - 1 for p in PROMPTS])
    assert 0 < gap.max() < 0.1  # a token, of a model with random weights


@pytest.mark.parametrize("speculation", ["lookup", "suffix"])
def test_drafts_change_nothing(model, speculation):
    texts = [[3, 4, 5, 6] * 6, [7, 8] * 9]
    with Engine(model, kv_dtype="fp8") as plain, Engine(model, kv_dtype="fp8", speculation=speculation) as drafting:
        wanted, got = ([o.outputs[0].token_ids for o in e.generate(texts, GREEDY)] for e in (plain, drafting))
    assert got == wanted


@triton
def test_triton_gives_the_same_tokens(model):
    some = SamplingParams(temperature=0.0, max_tokens=3)
    got = []
    for backend in ("torch", "triton"):
        with Engine(model, kv_dtype="fp8", backend=backend) as engine:
            got.append([o.outputs[0].token_ids for o in engine.generate(PROMPTS[:2], some)])
    assert got[0] == got[1]


def test_the_door_of_generate(model):
    batch = left_padded(prompts_of(9, 4))
    hf_paged.enable()
    try:
        out = model.generate(
            **batch,
            max_new_tokens=5,
            do_sample=False,
            cache_implementation="paged",
            cache_config={"kv_dtype": "fp8"},
            return_dict_in_generate=True,
        )
    finally:
        hf_paged.disable()
    keys = out.past_key_values.layers[0].keys
    assert out.sequences.shape == (2, 14) and keys.dtype == torch.float32
    assert torch.equal(keys, narrowed(keys, FP8).float())


def test_a_row_that_is_not_finite_fails_alone(model):
    import copy

    poisoned = copy.deepcopy(model)
    poisoned.model.embed_tokens.weight.data[98] = torch.nan
    with Engine(poisoned, kv_dtype="fp8", check=True, num_pages=30) as engine:
        good, bad = engine.generate([PROMPTS[1], [5, 98, 6]], GREEDY)
        assert good.error is None and "NaN" in str(bad.error)
        assert engine.store.finite(list(range(31)))


def test_prefixes_are_saved_and_read_back(model, tmp_path):
    with Engine(model, kv_dtype="fp8") as engine:
        wanted = engine.generate(PROMPTS, GREEDY)
        path = engine.save_prefixes(tmp_path)
    with Engine(model, kv_dtype="fp8") as engine:
        assert engine.load_prefixes(path) > 0
        got = engine.generate(PROMPTS, GREEDY)
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in wanted]
        assert engine.stats().cached_tokens > 0
    with Engine(model) as engine, pytest.raises(PrefixFileRefused, match="another dtype"):
        engine.load_prefixes(path)


def test_pages_come_back_from_a_directory(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_paged.tiers.Speed.worth", lambda *args: True)

    def run():
        with Engine(model, kv_dtype="fp8", num_pages=8, disk_cache=tmp_path, check=True) as engine:
            out = [engine.generate([p], GREEDY)[0].outputs[0].token_ids for p in PROMPTS for _ in range(2)]
            return out, engine.stats().restored_tokens

    with Engine(model, kv_dtype="fp8") as engine:
        wanted = [engine.generate([p], GREEDY)[0].outputs[0].token_ids for p in PROMPTS for _ in range(2)]
    assert run()[0] == wanted
    again, restored = run()
    assert again == wanted and restored > 0


def test_other_names_are_refused(model):
    with pytest.raises(ValueError, match=r"EngineConfig.kv_dtype='int4' is not allowed: one of auto, fp8"):
        Engine(model, kv_dtype="int4")
