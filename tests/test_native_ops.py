"""Compiled draws and products of few lines, against torch's."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_filters import params_strategy, random_scores, tensors

from hf_paged import filters
from hf_paged.kernels import native_sums
from hf_paged.kernels.native_products import FEW, product_ops
from hf_paged.kernels.native_sampling import sampling_ops
from hf_paged.params import SamplingParams
from hf_paged.sampling import SamplingRow
from hf_paged.speculation import choose as choosing

pytestmark = pytest.mark.skipif(sampling_ops() is None, reason="no C compiler: nothing is compiled")


def test_another_openmp_in_the_process_is_no_hindrance(tmp_path):
    """scikit-learn, which transformers imports, brings a copy of its own."""
    code = """
import ctypes, shutil, sys
from hf_paged.kernels.native import native_status
from hf_paged.kernels.native_build import openmp_of_torch
own = openmp_of_torch()
ctypes.CDLL(shutil.copy(own, sys.argv[1]))
assert openmp_of_torch() == own
assert native_status()[0] is not None, native_status()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "libgomp-copy.so.1")], check=True)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(params_strategy, min_size=1, max_size=5),
    vocab=st.sampled_from([1, 3, 31, 32, 33, 65, 300, 2000]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    rounded=st.booleans(),
    holes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_draws_are_those_of_torch(params, vocab, spread, rounded, holes, seed):
    scores = random_scores(seed, len(params), vocab, spread, rounded, holes)
    given_params = tensors(params, len(params))
    tokens, tops = sampling_ops().draw(scores, *given_params.arrays())
    warm = filters.warm(scores, given_params)
    assert tokens == filters.draw_dense(filters.filtered(warm, given_params), given_params).tolist()
    assert tops == warm.amax(1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_largest_score_draw_nothing(bad):
    scores = random_scores(0, 3, 70, 1.0)
    scores[1, 69] = bad
    tokens, tops = sampling_ops().draw(scores, *tensors(SamplingParams(top_p=0.9), 3).arrays())
    assert tokens[1] == -1 and not math.isfinite(tops[1])
    assert min(tokens[0], tokens[2]) >= 0


def test_scores_of_lines_that_lie_apart():
    wide = random_scores(0, 4, 200, 2.0)
    given_params = tensors(SamplingParams(top_k=9), 4)
    for part in (wide[:, :64], wide[:, ::2]):
        one, other = (sampling_ops().draw(scores, *given_params.arrays()) for scores in (part, part.contiguous()))
        assert one == other


def test_draws_under_seeds_and_at_places_of_any_size():
    seeds, places = [0, 7, -(2**62), 2**63 + 5], [0, 3, 123_456, 2**31]
    scores = random_scores(1, 16, 4096, 0.5)
    given_params = filters.draw_tensors(
        [SamplingParams()] * 16, seeds * 4, [place for place in places for _ in seeds], scores.device
    )
    tokens, _ = sampling_ops().draw(scores, *given_params.arrays())
    assert tokens == filters.draw_dense(scores, given_params).tolist()


def test_drafts_are_those_of_torch(monkeypatch):
    kinds = [(0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.9, 0), (0.7, 0.5, 0), (1.0, 1.0, 2), (1.0, 0.05, 0)]
    rows = [
        SamplingRow(SamplingParams(temperature=t, top_p=p, top_k=k), 5 + i, 9, [1], [2])
        for i, (t, p, k) in enumerate(kinds)
    ]
    logits = random_scores(3, len(rows), 300, 2.0)
    ids, probs = choosing.choose(logits, rows, 4)
    monkeypatch.setattr(filters, "compiled", lambda scores: None)
    wanted_ids, wanted_probs = choosing.choose(logits, rows, 4)
    for i, (_, top_p, _) in enumerate(kinds):  # torch's top_p is a little wider here, and fills up with what is dropped
        assert ids[i][0] == wanted_ids[i][0]
        if top_p == 1:
            assert ids[i] == wanted_ids[i][: len(ids[i])]
            assert probs[i] == pytest.approx(wanted_probs[i][: len(ids[i])], abs=1e-4)
    assert [len(row) for row in ids][-2:] == [2, 1]


@pytest.mark.parametrize("width, height", [(384, 64), (37, 50), (8, 3), (5, 1)])
def test_products_are_those_of_torch(width, height):
    torch.manual_seed(0)
    ops = product_ops()
    layers = [(torch.randn(n, width), torch.randn(n) if n % 2 else None) for n in (height, height + 1, 5)]
    gate, up = layers[0], (torch.randn(height, width), torch.randn(height))
    for lines in (*range(1, FEW + 1), 16, 23, 48):
        x = torch.randn(lines, 2 * width)[:, :width]
        wanted = torch.cat([F.linear(x, *layer) for layer in layers], 1)
        add = torch.randn_like(wanted)
        torch.testing.assert_close(ops.linear(x, *layers, add=add), wanted + add, atol=1e-4, rtol=1e-4)
        gated = F.silu(F.linear(x, *gate)) * F.linear(x, *up)
        torch.testing.assert_close(ops.gated(x, gate, up), gated, atol=1e-3, rtol=1e-4)


def test_a_line_does_not_depend_on_how_many_there_are():
    torch.manual_seed(0)
    ops, layer = product_ops(), (torch.randn(70, 100), None)
    x = torch.randn(FEW, 100)
    together, gated = ops.linear(x, layer), ops.gated(x, layer, layer)
    for lines in (1, 2, 3, 5):
        assert torch.equal(ops.linear(x[:lines], layer), together[:lines])
        assert torch.equal(ops.gated(x[:lines], layer, layer), gated[:lines])


def test_sums_of_bits_are_those_of_torch(monkeypatch):
    parts = [torch.randn(*shape) for shape in [(3, 5), (1,), (16,), (7, 33), (128, 300)]]
    looks = [(every, turn) for every in (1, 2, 5) for turn in range(every)]
    compiled = [native_sums.sum_of_bits(parts, *look) for look in looks]
    monkeypatch.setattr(native_sums, "native_ops", lambda: None)
    assert compiled == [native_sums.sum_of_bits(parts, *look) for look in looks]
    parts[4][100, 7] += 1
    assert compiled != [native_sums.sum_of_bits(parts, *look) for look in looks]


@pytest.mark.parametrize("compiled", [True, False])
def test_samples_see_what_changed(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native_sums, "native_ops", lambda: None)
    views = [torch.arange(90, dtype=dtype)[::3] for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)]
    samples = native_sums.Samples(views, 4)
    assert samples.same()
    for view in views:
        before = view[21].item()  # 30 numbers, of which every seventh is looked at
        view[21] = 5
        assert not samples.same()
        view[21] = before
        view[20] = 5
        assert samples.same()
    assert native_sums.Samples([], 4).same()
