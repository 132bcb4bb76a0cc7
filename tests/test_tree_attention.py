"""Attention where drafts branch: each sees its own path only, whatever lies between, in every path of the ops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_paged.kernels import PagedRows, groups, paged_attention, reference
from hf_paged.kernels.rows import ALL, TreeMask
from hf_paged.speculation.proposal import tree_places


def scene(rng, page_size, before, trees, heads=6, kv_heads=2, dim=16):
    """Rows of which some are decodes (None), some chunks (an int), and some trees (their parents)."""
    lens = [1 if tree is None else tree if isinstance(tree, int) else 1 + len(tree) for tree in trees]
    contexts = [past + count for past, count in zip(before, lens, strict=True)]
    counts = [-(-context // page_size) for context in contexts]
    ids = rng.permutation(sum(counts)) + 1
    table = np.zeros((len(lens), max(counts)), np.int64)
    at = 0
    for row, count in enumerate(counts):
        table[row, :count] = ids[at : at + count]
        at += count
    total = sum(lens)
    mask = TreeMask(np.full(total, ALL), np.zeros(total, np.int64), np.zeros(total, np.int64))
    at = 0
    for past, count, tree in zip(before, lens, trees, strict=True):
        own = slice(at, at + count)
        mask.base[own], mask.positions[own] = past, np.arange(past, past + count)
        if isinstance(tree, tuple):
            mask.positions[own], mask.visible[own] = tree_places(tree, past)
        at += count
    shape = (sum(counts) + 1, kv_heads, page_size, dim)
    keys, values = torch.randn(shape), torch.randn(shape)
    decodes = sum(tree is None for tree in trees)
    slots = torch.zeros(total, dtype=torch.long)
    lens, contexts = np.array(lens), np.array(contexts)
    rows = PagedRows(page_size, decodes, lens, contexts, table, slots, tree=mask)
    return torch.randn(total, heads, dim), keys, values, rows


WIDE = tuple(int(parent) for parent in np.random.default_rng(3).integers(-1, np.arange(62)))


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("small", [False, True])
def test_trees_equal_the_reference(window, softcap, small, monkeypatch):
    if small:  # every shared stretch becomes a group
        monkeypatch.setattr(groups, "LEAST_SLOTS", 1)
        monkeypatch.setattr(groups, "LEAST_QUERIES", 1)
    torch.manual_seed(0)
    trees = [None, (-1, -1, 0, 1, 1, 4), 5, (-1, 0, 1), WIDE, (-1, -1)]
    before = [40, 20, 7, 33, 16, 0]
    query, keys, values, rows = scene(np.random.default_rng(1), 16, before, trees)
    sinks = torch.randn(6)
    for options in ({}, {"sinks": sinks}):
        options = {"scale": 0.25, "window": window, "softcap": softcap, **options}
        wanted = reference.paged_attention(query, keys, values, rows, **options)
        for backend in ("auto", "torch"):
            got = paged_attention(query, keys, values, replace(rows, backend=backend), **options)
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def test_a_branch_sees_nothing_of_its_siblings():
    query, keys, values, rows = scene(np.random.default_rng(1), 4, [6], [(-1, -1, 0, 1)])
    before = paged_attention(query, keys, values, rows, scale=0.25)
    page, offset = rows.page_table[0, 8 // 4], 8 % 4  # the second child of the root
    keys[page, :, offset], values[page, :, offset] = 7.0, 7.0
    after = paged_attention(query, keys, values, rows, scale=0.25)
    same = [bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, True, False]
