"""The Triton kernels against the reference, in Triton's interpreter (see `interpreter.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import assert_equal, engine_of, left_padded, prompts_of
from kernel_cases import Case, make, random_case
from tiny_models import ENGINE
from tiny_models import make as make_model

import hf_paged
from hf_paged import Engine
from hf_paged.kernels import PagedRows, backends, choose_backend, launch, paged_attention, write_kv

pytest.importorskip("triton")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1, set where there is no GPU")
TREE = (-1, -1, 0, 1, 1, 4, 2, -1, 6)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and splits so small that short rows have many of both."""
    from hf_paged.kernels import triton_path

    def smaller(*args):
        config = tiles_of(*args)
        small = 16 * config.warps if config.warps == 2 else 16  # two warps may have a softmax each
        return replace(config, block_m=max(16, min(config.block_m, 32)), block_n=small, split=32)

    tiles_of = triton_path.tiles_of
    monkeypatch.setattr(triton_path, "tiles_of", smaller)


def assert_right(case: Case) -> None:
    step = make(case)
    got = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    torch.testing.assert_close(got, step.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(rows=((0, None), (130, None), (63, None)), page_size=16),
        Case(rows=((200, None), (3, None)), page_size=1, group=7, kv_heads=1, dim=96, value_dim=40),
        Case(rows=((70, None), (9, None)), page_size=256, window=33, sinks=True, softcap=2.0),
        Case(rows=((0, 70), (50, 9)), page_size=32, dim=80, group=3),
        Case(rows=((90, 21), (5, 1)), page_size=2, window=7, group=1, kv_heads=3),
        Case(rows=((60, TREE), (0, TREE[:4])), page_size=64),
        Case(rows=((60, TREE), (20, TREE[:4]), (9, 3), (40, None)), page_size=4, window=6, softcap=2.0, sinks=True),
    ],
    ids=str,
)
def test_equals_the_reference(case, small_tiles):
    assert_right(case)


@pytest.mark.parametrize("seed", range(8))
def test_random_steps(seed):
    assert_right(random_case(np.random.default_rng(seed), longest=50, dims=(8, 16, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decode", "extend", "tree"])
def test_more_random_steps(kind, small_tiles):
    for seed in range(40):
        assert_right(random_case(np.random.default_rng(1000 + seed), kind))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["decode", "extend", "tree"])
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_many_random_steps(kind, first, small_tiles):
    for seed in range(first, first + 50):
        assert_right(random_case(np.random.default_rng(1000 + seed), kind))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["decode", "any"])
def test_many_random_steps_with_the_tiles_of_a_card(kind):
    for seed in range(30):
        assert_right(random_case(np.random.default_rng(seed), kind, longest=900))


@pytest.mark.slow
def test_many_random_writes():
    for seed in range(300):
        check_write(np.random.default_rng(seed))


def check_write(rng: np.random.Generator) -> None:
    """New keys and values lie in their slots, and nothing else has changed."""
    heads, size = int(rng.integers(1, 9)), int(2 ** rng.integers(0, 9))
    dims, tokens, pages = rng.integers(1, 100, 2).tolist(), int(rng.integers(0, 12)), int(rng.integers(2, 6))
    keys, values = (torch.randn(pages, heads, size, dim) for dim in dims)
    wanted = [keys.clone(), values.clone()]
    # As a model hands them over: heads before tokens.
    key, value = (torch.randn(heads, tokens, dim).transpose(0, 1) for dim in dims)
    slots = rng.permutation(pages * size)[:tokens]
    slots = np.where(rng.random(len(slots)) < 0.2, -1, slots)
    key, value = key[: len(slots)], value[: len(slots)]
    for at, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[0][slot // size, :, slot % size], wanted[1][slot // size, :, slot % size] = key[at], value[at]
    rows = make(Case()).rows
    write_kv(key, value, keys, values, replace(rows, page_size=size, slots=torch.from_numpy(slots), _derived={}))
    assert torch.equal(keys, wanted[0]) and torch.equal(values, wanted[1])


@pytest.mark.parametrize("seed", range(5))
def test_writes(seed):
    check_write(np.random.default_rng(seed))


@pytest.mark.parametrize("window", [None, 40])
def test_a_row_does_not_depend_on_its_batch(window, small_tiles):
    """Bit for bit, although the others make the grid and the tiles' queries many more."""
    rows = ((70, None), (17, None), (100, None), (40, 7), (9, 40), (40, TREE))
    step = make(Case(rows=rows, window=window, kv_heads=1))
    together = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    ends = np.cumsum(step.rows.query_lens)
    for row, (end, count) in enumerate(zip(ends, step.rows.query_lens, strict=True)):
        own = slice(int(end - count), int(end))
        tree = step.rows.tree
        alone = replace(
            step.rows,
            num_decodes=int(row < step.rows.num_decodes),
            query_lens=step.rows.query_lens[row : row + 1],
            context_lens=step.rows.context_lens[row : row + 1],
            page_table=step.rows.page_table[row : row + 1],
            tree=replace(tree, visible=tree.visible[own], base=tree.base[own], positions=tree.positions[own]),
            _derived={},
        )
        got = paged_attention(step.query[own], step.keys, step.values, alone, **step.options)
        assert torch.equal(got, together[own])


def test_rows_without_slots_or_queries():
    """A row that sees nothing gets zeros, with a sink too; one without queries gets nothing."""
    step = make(Case(rows=((5, None), (4, 3), (2, 2)), sinks=True))
    rows = replace(step.rows, query_lens=np.array([1, 3, 0]), context_lens=np.array([0, 7, 4]), _derived={})
    got = paged_attention(step.query[:4], step.keys, step.values, rows, **step.options)
    assert not got[0].any()
    torch.testing.assert_close(got[1:4], step.expected()[1:4], atol=2e-5, rtol=2e-5)


def test_half_precision():
    case = Case(rows=((90, None), (30, 40), (20, TREE)), dim=64, value_dim=64)
    step, exact = make(replace(case, dtype=torch.float16)), make(case)  # the interpreter has no products of bfloat16
    got = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), exact.expected(), atol=5e-3, rtol=5e-3)


def test_bfloat16_is_refused_where_the_interpreter_would_give_wrong_numbers():
    step = make(replace(Case(rows=((20, None),)), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16 is not allowed"):
        paged_attention(step.query, step.keys, step.values, step.rows, **step.options)


def test_queries_that_are_not_contiguous():
    step = make(Case(rows=((40, None), (20, 9))))
    for query in (
        step.query.transpose(0, 1).contiguous().transpose(0, 1),
        step.query.repeat_interleave(2, 2)[..., ::2],
    ):
        assert not query.is_contiguous()
        got = paged_attention(query, step.keys, step.values, step.rows, **step.options)
        torch.testing.assert_close(got, step.expected(), atol=2e-5, rtol=2e-5)


def test_what_is_refused():
    step = make(Case())
    rows, keys, values = step.rows, step.keys, step.values
    for query, pages, name in (
        (step.query.half(), (keys, values), "query.dtype"),
        (step.query[..., :8], (keys, values), "head_dim"),
        (step.query[:, :3], (keys, values), "heads"),
        (step.query, (keys.transpose(1, 2).contiguous().transpose(1, 2), values), "key_pages"),
    ):
        with pytest.raises(ValueError, match=name):
            paged_attention(query, *pages, rows, scale=1.0)
    new = torch.zeros(len(step.query), 2, 16)
    with pytest.raises(ValueError, match="value.dtype"):
        write_kv(new, new.half(), keys, values, rows)
    with pytest.raises(ValueError, match="value.shape"):
        write_kv(new, new[:3], keys, values, rows)


def test_pages_that_no_kernel_takes_go_to_torch():
    step = make(Case(page_size=3))
    finite = [torch.nan_to_num(t) for t in (step.keys, step.values)]
    rows = replace(step.rows, page_table=np.maximum(step.rows.page_table, 0), _derived={})
    got = paged_attention(step.query, *finite, rows, **step.options)
    torch.testing.assert_close(got, step.expected(), atol=2e-5, rtol=2e-5)


# -- which backend


def test_a_kernel_that_does_not_compile(monkeypatch):
    """One warning, with the reason; the same numbers; and whoever asks is told."""
    from hf_paged.kernels import triton_path

    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    assert backends._problem("cpu") is None  # remembered: the interpreter is denied from here on
    monkeypatch.setattr(triton_path, "paged_attention", broken)
    monkeypatch.setattr(backends, "_failure", [])
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    step = make(Case(rows=((5, None), (4, 3)), page_size=8))
    finite = [torch.nan_to_num(t) for t in (step.keys, step.values)]
    rows = replace(step.rows, page_table=np.maximum(step.rows.page_table, 0))
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        got = paged_attention(step.query, *finite, rows, **step.options)
    torch.testing.assert_close(got, step.expected(), atol=2e-5, rtol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paged_attention(step.query, *finite, rows, **step.options)
    name, why = choose_backend("auto", "cuda")
    assert name == "torch" and "no such instruction" in why


def test_prefill_that_does_not_compile(monkeypatch):
    """`extend` takes its tiles, with one warning; the other kernels go on."""
    from hf_paged.kernels import prefill, triton_path

    def broken(*args, **kwargs):
        raise RuntimeError("no warp groups")

    assert backends._problem("cpu") is None
    monkeypatch.setattr(prefill, "prefill", broken)
    monkeypatch.setattr(backends, "_no_prefill", [])
    monkeypatch.setattr(backends, "_failure", [])
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    monkeypatch.setattr(triton_path, "_prefills", lambda *_: True)
    monkeypatch.setattr(triton_path, "prefill_config", lambda *_: launch.TileConfig(32, 32, 1024, 4, 2))
    monkeypatch.setattr(triton_path, "few_lines", lambda *_: 16)
    step = make(Case(rows=((5, None), (4, 60), (0, 3), (9, (-1, 0, 0) * 9))))
    with pytest.warns(RuntimeWarning, match="extend.py does instead.*no warp groups"):
        got = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    torch.testing.assert_close(got, step.expected(), atol=2e-5, rtol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = paged_attention(step.query, step.keys, step.values, step.rows, **step.options)
    assert torch.equal(got, again) and not backends._failure


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch, model):
    assert choose_backend("triton", "cpu")[0] == "triton" and choose_backend("auto", "cpu")[0] == "torch"
    backends._problem.cache_clear()
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    try:
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            Engine(model, backend="triton", num_pages=8)
    finally:
        backends._problem.cache_clear()


def generate_on_triton(stem: str, count: int) -> None:
    hf_paged.enable(check=True, page_size=4, num_pages=512, backend="triton")
    try:
        model = make_model(stem, ENGINE[stem])
        assert_equal(model, **left_padded(prompts_of(9, 4, 13)), max_new_tokens=count)
        assert engine_of(model).backend == "triton"
    finally:
        hf_paged.disable()


@pytest.mark.parametrize("stem", ["Llama", "GptOss"])
def test_generate(stem):
    generate_on_triton(stem, 3)


@pytest.mark.long
@pytest.mark.parametrize("stem", ENGINE)
def test_generate_on_every_architecture(stem):
    generate_on_triton(stem, 8)


def test_generate_with_drafts(model):
    """Chains and trees of drafts are verified by the same kernels."""
    prompts = [p[0].tolist() for p in prompts_of(9, 5)]
    plain = Engine(model, num_pages=64, page_size=4)
    always = hf_paged.SpeculationConfig(method="draft", adaptive=False)
    options = dict(backend="triton", draft_model=model, speculation=always, check=True)
    drafting = Engine(model, num_pages=64, page_size=4, **options)
    params = hf_paged.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with plain, drafting:
        wanted, got = (
            [list(r.outputs[0].token_ids) for r in engine.generate(prompts, params, raise_errors=True)]
            for engine in (plain, drafting)
        )
        assert got == wanted and drafting.speculation_stats().accepted > 0


# -- how they are launched

TARGETS = [
    launch.Target("cuda", "sm_80", 108),
    launch.Target("cuda", "sm_86", 84),
    launch.Target("cuda", "sm_90", 132),
    launch.Target("cuda", "sm_100", 148),
    launch.Target("cuda", "sm_121", 48),
    launch.Target("hip", "gfx942", 304),
    launch.Target("xpu", "xpu", 128),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
def test_tiles_fit_every_shape(target):
    for dim in (8, 64, 80, 128, 192, 256):
        for group in (1, 3, 8, 71):
            for itemsize in (2, 4):
                shape = launch.HeadShape(group, 8, dim, dim, itemsize, 16)
                configs = [launch.decode_config(shape, target)]
                configs += [launch.extend_config(shape, target, few) for few in (True, False)]
                for config in configs:
                    assert config.block_m >= max(16, group) and config.block_n >= 16 and config.stages >= 1
                    assert config.split % config.block_n == 0
                    numbers = (config.block_m, config.block_n, config.split, config.warps)
                    assert all(n == launch.power_of_two(n) for n in numbers)
                    size = launch.tile_bytes(shape, config.block_m, config.block_n, config.stages)
                    assert size <= target.shared or (config.stages == 1 and config.block_n == 16)


@pytest.mark.parametrize("group, dim, shares", [(4, 64, 2), (8, 128, 2), (16, 64, 1), (4, 80, 1), (4, 256, 1)])
def test_warps_share_tiles_where_registers_last(group, dim, shares):
    shape = launch.HeadShape(group, 2, dim, dim, 2, 16)
    target = launch.Target("cuda", "sm_90", 132)
    assert launch.shares(shape, launch.decode_config(shape, target), target) == shares


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
def test_few_programs_over_fp8_fetch_ahead(target):
    """On Hopper, of heads whose parts are summed alike by either kernel, as many as have room at once."""
    shape = launch.HeadShape(4, 8, 128, 128, 1, 16)
    config = launch.decode_config(replace(shape, itemsize=2), target)
    most = 2 * target.processors
    assert launch.fetches_ahead(shape, config, target, 2, most) == (target.arch == "sm_90")
    assert not launch.fetches_ahead(shape, config, target, 2, most + 1)
    assert not launch.fetches_ahead(shape, config, target, 4, 1)
    assert launch.halved(shape, config, target, 2) == (target.arch == "sm_90")
    assert not launch.halved(replace(shape, group=5), config, target, 2)
    for other in (dict(group=2), dict(group=16), dict(key_dim=64, value_dim=64), dict(key_dim=256)):
        assert not launch.fetches_ahead(replace(shape, **other), config, target, 2, 1)


def test_splits_suit_the_card():
    """A row of 32k alone is enough for a card of many processors, also with few KV heads."""
    for processors in (108, 132, 304):
        for kv_heads in (1, 2, 8):
            shape = launch.HeadShape(4, kv_heads, 128, 128, 2, 16)
            target = launch.Target("cuda", "sm_90", processors)
            split, full = launch.decode_config(shape, target).split, launch.full_splits(shape, target)
            programs = kv_heads * launch.splits_of(32768, split, full)
            assert programs > processors - kv_heads or split == 128


def test_splits_grow_with_a_row():
    """What a program reads stays within bounds, and a longer row never has fewer splits: the longest sizes the grid."""
    split, full = 128, 16
    before = 0
    for slots in range(0, 40_000, 7):
        count = launch.splits_of(slots, split, full)
        assert before <= count <= max(1, slots // split + 1)
        assert slots <= count * split * 2.5
        before = count


@pytest.mark.parametrize("count, slots, parts", [(4, 40, 1), (4, 95, 1), (4, 97, 2), (4, 640, 6), (64, 640, 3)])
def test_a_few_queries_are_split_evenly(count, slots, parts):
    """Whole blocks, each slot once, no more parts than occupy the card until they are twice as large."""
    from hf_paged.kernels.worklist import build_work

    lens = np.array([count]), np.array([slots])
    rows = PagedRows(16, 0, *lens, np.ones((1, 40), np.int64), torch.zeros(count, dtype=torch.long))
    config = launch.TileConfig(64, 16, 64, 4, 3)
    items, lines, tiles = build_work(rows, np.array([0]), config, 2, 6, None, None)
    start, stop, part, first, pieces, tile = items[:, [4, 7, 8, 9, 10, 11]].T
    assert tiles == -(-count // 32) and len(items) == sum(pieces[tile == t][0] for t in range(tiles))
    assert lines == (count * parts if parts > 1 else 0) and (pieces == parts).all()
    for t in range(tiles):
        own = np.sort(start[tile == t])
        assert own[0] == 0 and (own % 16 == 0).all()
        assert sum(stop[tile == t] - start[tile == t]) == stop[tile == t].max()
        if parts > 1:
            number = (part - first)[tile == t] // min(count, 32)
            assert sorted(number) == list(range(parts))


def test_shapes_that_the_kernels_do_not_take():
    shape = launch.HeadShape(4, 8, 128, 128, 2, 16)
    assert launch.unsupported(shape) is None
    for change in ({"page_size": 24}, {"key_dim": 640}, {"key_dim": 320, "itemsize": 4}, {"group": 200}):
        assert launch.unsupported(replace(shape, **change))


# -- ahead of time, for cards that are not there


@lru_cache
def compile_elsewhere(*arguments: str) -> list[dict]:
    """Lines of `python -m hf_paged.kernels.aot`: the interpreter cannot be turned off in this process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hf_paged.kernels.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_common_configurations_compile(target):
    check_compiled(target, compile_elsewhere(target, "--some"))


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_all_configurations_compile(target):
    check_compiled(target, compile_elsewhere(target))


def check_compiled(target: str, made: list[dict]) -> None:
    """All of the card's kernels are there, fit, and decode does not spill."""
    from hf_paged.kernels.aot import KERNELS

    absent = set() if target == "sm_90" else {"merge", "prefill"}  # Hopper's alone
    assert {one["variant"]["kernel"] for one in made} == set(KERNELS) - absent
    assert not [one for one in made if one["bad"]]
    assert all(one["registers"] for one in made)
    widths = {"bf16": 2, "fp32": 4, "fp8e4nv": 1}
    for one in made:
        constants, variant = dict(one["variant"]["constants"]), one["variant"]
        if constants.get("SHARES", 1) > 1:  # tiles are on their way while others are computed with
            tile = constants["BLOCK_N"] * (constants["KEY_DIM"] + constants["VALUE_DIM"]) * widths[variant["pages"]]
            assert one["shared"] >= (variant["stages"] - 1) * tile, one


def test_the_benchmark_of_kernels():
    """In small, with everything that the report is shown from."""
    from hf_paged.integrations.bench.kernels import Scale, run_kernels
    from hf_paged.integrations.cli.bench_kernels import show_kernels

    sizes = dict(decodes=((2, 40),), sweep=(1, 3), sweep_slots=60, prefill=33, verify=(3, 4, 40), shared=(3, 60, 40))
    small = dict(copy_bytes=1 << 16, matmul=64, layer_bytes=1)
    report = run_kernels(Scale(4, 2, 16, 4, torch.float32, "cpu", 1, **sizes, **small))
    for part in (*report["decode"], *report["decode_fp8"], *report["sweep"], report["prefill"], report["verify"]):
        assert part["seconds"] > 0 and part["relative_error"] < 1e-5
    assert report["shared"]["equal"]
    show_kernels(report)
