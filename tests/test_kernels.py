"""Paged attention against the obvious reference, over odd shapes, with poisoned pages that no row uses."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.kernels import PagedRows, choose_backend, paged_attention, write_kv
from hf_paged.kernels.reference import paged_attention as reference


def make_rows(rng, page_size, lens, contexts, scattered):
    """Page tables over a pool where each row has its own pages; decodes come first."""
    counts = [-(-c // page_size) for c in contexts]
    total = sum(counts)
    ids = rng.permutation(np.arange(1, 3 * total + 1))[:total] if scattered else np.arange(1, total + 1)
    table = np.zeros((len(lens), max(counts)), np.int64)
    slots, taken = [], 0
    for row, (length, context) in enumerate(zip(lens, contexts, strict=True)):
        pages = ids[taken : taken + counts[row]]
        table[row, : counts[row]] = pages
        taken += counts[row]
        where = np.arange(context - length, context)
        slots.extend(pages[where // page_size] * page_size + where % page_size)
    return PagedRows(
        page_size=page_size,
        num_decodes=sum(1 for n in lens if n == 1) if sorted(lens)[: lens.count(1)] == lens[: lens.count(1)] else 0,
        query_lens=np.array(lens, np.int64),
        context_lens=np.array(contexts, np.int64),
        page_table=table,
        slots=torch.tensor(slots, dtype=torch.long),
    ), 3 * total + 1


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([1, 2, 3, 16, 32]))
    decodes = draw(st.lists(st.integers(1, 70), max_size=6))
    extends = draw(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 40)), max_size=3))
    lens = [1] * len(decodes) + [n for n, _ in extends]
    contexts = decodes + [n + past for n, past in extends]
    if not lens:
        lens, contexts = [1], [1]
    return dict(
        page_size=page_size,
        lens=lens,
        contexts=contexts,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        groups=draw(st.sampled_from([1, 2, 3])),
        dim=draw(st.sampled_from([8, 20, 96])),
        value_dim=draw(st.sampled_from([8, 24])),
        window=draw(st.sampled_from([None, None, 1, 5, 17])),
        softcap=draw(st.sampled_from([None, 3.0])),
        sinks=draw(st.booleans()),
        scattered=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_reference(case):
    rng, gen = np.random.default_rng(case["seed"]), torch.Generator().manual_seed(case["seed"])
    rows, num_pages = make_rows(rng, case["page_size"], case["lens"], case["contexts"], case["scattered"])
    heads = case["kv_heads"] * case["groups"]
    shape = (num_pages, case["kv_heads"], case["page_size"])
    keys = torch.randn(*shape, case["dim"], generator=gen)
    values = torch.randn(*shape, case["value_dim"], generator=gen)
    tokens = sum(case["lens"])
    key = torch.randn(tokens, case["kv_heads"], case["dim"], generator=gen)
    value = torch.randn(tokens, case["kv_heads"], case["value_dim"], generator=gen)
    write_kv(key, value, keys, values, rows)
    query = torch.randn(tokens, heads, case["dim"], generator=gen)
    sinks = torch.randn(heads, generator=gen) if case["sinks"] else None
    options = dict(scale=0.3, window=case["window"], softcap=case["softcap"], sinks=sinks)
    wanted = reference(query, keys, values, rows, **options)
    for backend in ("auto", "torch"):
        got = paged_attention(query, keys, values, replace(rows, backend=backend), **options)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    with_fresh = paged_attention(query, keys, values, rows, fresh=(key, value), **options)
    torch.testing.assert_close(with_fresh, wanted, atol=2e-5, rtol=2e-5)


def test_pages_that_are_gathered_may_lie_among_poison():
    rng = np.random.default_rng(0)
    rows, _ = make_rows(rng, 4, [1, 1, 3], [9, 30, 12], scattered=False)
    stretched = PagedRows(4, 2, rows.query_lens, rows.context_lens, rows.page_table * 5, rows.slots)
    keys = torch.full((90, 2, 4, 8), torch.nan)
    values = keys.clone()
    used = np.unique(stretched.page_table[stretched.page_table > 0])
    keys[used], values[used] = torch.randn(len(used), 2, 4, 8), torch.randn(len(used), 2, 4, 8)
    query = torch.randn(5, 4, 8)
    got = paged_attention(query, keys, values, stretched, scale=1.0)
    torch.testing.assert_close(got, reference(query, keys, values, stretched, scale=1.0), atol=2e-5, rtol=2e-5)


def test_slot_zero_takes_what_goes_nowhere():
    rows = PagedRows(2, 1, np.array([1]), np.array([1]), np.array([[1]]), torch.tensor([0]))
    keys = values = torch.zeros(3, 1, 2, 4)
    write_kv(torch.ones(1, 1, 4), torch.ones(1, 1, 4), keys, values, rows)
    assert keys[1:].abs().sum() == 0 and keys[0, 0, 0].sum() == 4


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_backend_says_why(device):
    name, reason = choose_backend("auto", device)
    there = device == "cuda" and importlib.util.find_spec("triton") is not None
    assert name == ("triton" if there else "torch") and reason
    assert choose_backend("torch", device)[0] == "torch"
