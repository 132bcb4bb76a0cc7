"""Attention that is computed once for many queries equals that of each query by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_paged.kernels import PagedRows, groups, paged_attention, reference
from hf_paged.kernels.native import native_ops
from hf_paged.kernels.rows import ALL, TreeMask

pytestmark = pytest.mark.skipif(native_ops() is None, reason="no C compiler: nothing is grouped")


def scene(rng, page_size, heads, kv_heads, dim, value_dim, shares, lens):
    """Rows whose tables begin alike: row i has `shares[i]` pages of the row before it, and then some of its own."""
    tables, context, next_page = [], [], 1
    for i, (share, length) in enumerate(zip(shares, lens, strict=True)):
        known = tables[i - 1][:share] if i else []
        own = -(-length // page_size) + int(rng.integers(0, 3))
        tables.append([*known, *range(next_page, next_page + own)])
        next_page += own
        most = len(tables[-1]) * page_size
        context.append(int(rng.integers(max(len(known) * page_size + 1, length), most + 1)) if i else most)
        context[-1] = max(context[-1], len(known) * page_size + length)
    order = sorted(range(len(lens)), key=lambda i: lens[i] > 1)
    width = max(map(len, tables)) + 1
    table = np.zeros((len(lens), width), np.int64)
    for at, i in enumerate(order):
        table[at, : len(tables[i])] = tables[i]
    lens, context = np.array([lens[i] for i in order]), np.array([context[i] for i in order])
    pages = rng.permutation(next_page - 1) + 1
    table[table > 0] = pages[table[table > 0] - 1]
    shape = (next_page + 2, kv_heads, page_size)
    keys, values = torch.randn(*shape, dim), torch.randn(*shape, value_dim)
    unused = sorted(set(range(next_page + 2)) - set(table.flatten().tolist()))
    keys[unused], values[unused] = torch.nan, torch.nan
    query = torch.randn(int(lens.sum()), heads, dim)
    slots = torch.zeros(len(query), dtype=torch.long)

    def rows(grouped):
        return PagedRows(page_size, int((lens == 1).sum()), lens, context, table, slots, grouped=grouped)

    return query, keys, values, rows


def compare(query, keys, values, rows, **settings):
    settings = {"scale": query.shape[-1] ** -0.5, **settings}
    got = paged_attention(query, keys, values, rows(True), **settings)
    alone = paged_attention(query, keys, values, rows(False), **settings)
    wanted = reference.paged_attention(query, keys, values, rows(False), **settings)
    torch.testing.assert_close(got, wanted, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(got, alone, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("heads, kv_heads, dim", [(6, 2, 64), (4, 4, 20), (8, 1, 128), (10, 2, 32)])
@pytest.mark.parametrize("settings", [{}, {"window": 9}, {"softcap": 20.0}, {"sinks": True}])
@pytest.mark.parametrize("page_size", [4, 32])
def test_queries_of_a_row_have_the_bits_of_each_by_itself(heads, kv_heads, dim, settings, page_size):
    """They read their slots together. What is no number where one of them lies is in none before it."""
    query, keys, values, rows = scene(
        np.random.default_rng(7), page_size, heads, kv_heads, dim, dim, [0] * 5, [1, 3, 7, 2, 8]
    )
    rows = rows(False)
    lens, context, table = rows.query_lens, rows.context_lens, rows.page_table
    settings = {"scale": 0.2, **settings, **({"sinks": torch.randn(heads)} if "sinks" in settings else {})}
    places = [(row, int(context[row] - lens[row] + i)) for row in range(5) for i in range(lens[row])]
    last = context[4] - 1
    for pages in (keys, values):
        pages[table[4, last // page_size], :, last % page_size] = torch.nan
    together = paged_attention(query, keys, values, rows, **settings)
    for index, (row, place) in enumerate(places):
        at = np.array([place + 1]), table[row : row + 1]
        one = PagedRows(page_size, 1, np.array([1]), *at, torch.zeros(1, dtype=torch.long), grouped=False)
        got = paged_attention(query[index : index + 1], keys, values, one, **settings)
        assert torch.equal(got[0], together[index]) or index == len(places) - 1


@pytest.fixture
def everything_grouped(monkeypatch):
    """Groups however small: what pays is a matter of speed."""
    monkeypatch.setattr(groups, "LEAST_SLOTS", 1)
    monkeypatch.setattr(groups, "LEAST_QUERIES", 1)
    monkeypatch.setattr(groups, "LEAST_CAUSAL", 1)


SHAPES = [(6, 2, 64, 64), (4, 4, 16, 16), (8, 1, 128, 128), (3, 3, 20, 12), (10, 2, 40, 24), (16, 4, 128, 128)]


@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", SHAPES)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_nested_prefixes(everything_grouped, heads, kv_heads, dim, value_dim, page_size):
    rng = np.random.default_rng(page_size + heads)
    torch.manual_seed(0)
    shares = [0, 3, 3, 5, 5, 2, 2, 0, 1]
    made = scene(rng, page_size, heads, kv_heads, dim, value_dim, shares, [8, 1, 1, 9, 1, 1, 11, 3, 1])
    assert groups.build_groups(made[3](True)) is not None
    compare(*made)


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"sinks": True}, {"window": 7}, {"window": 1000}])
def test_what_models_add(everything_grouped, settings):
    rng = np.random.default_rng(3)
    torch.manual_seed(1)
    made = scene(rng, 4, 6, 2, 64, 64, [0, 2, 2, 3, 1], [6, 1, 1, 1, 5])
    if settings.pop("sinks", False):
        settings["sinks"] = torch.randn(6) * 3
    compare(*made, **settings)


def test_random_scenes(everything_grouped):
    rng = np.random.default_rng(7)
    torch.manual_seed(2)
    for _ in range(60):
        count, kv_heads = int(rng.integers(1, 9)), int(rng.integers(1, 4))
        shares = [0, *rng.integers(0, 5, count - 1).tolist()]
        lens = rng.choice([1, 1, 1, 2, 7, 13], count).tolist()
        shape = (kv_heads * int(rng.integers(1, 6)), kv_heads, int(rng.integers(1, 70)), int(rng.integers(1, 70)))
        compare(*scene(rng, int(rng.choice([1, 3, 8, 16, 32])), *shape, shares, lens))


def test_a_long_prefix_is_one_segment_and_each_row_keeps_the_rest():
    lens, table = (
        np.ones(16, np.int64),
        np.concatenate([np.tile(np.arange(1, 21), (16, 1)), np.arange(21, 37)[:, None]], 1),
    )
    rows = PagedRows(16, 16, lens, np.full(16, 330), table, torch.zeros(16, dtype=torch.long))
    found = groups.build_groups(rows)
    assert found.segments.tolist() == [[0, 0, 320, 0, 16, 0]] and set(found.own.tolist()) == {320}


def test_a_prompt_behind_a_prefix_is_one_segment():
    rows = PagedRows(
        16, 0, np.array([100]), np.array([500]), np.arange(1, 33)[None], torch.zeros(100, dtype=torch.long)
    )
    assert groups.build_groups(rows).segments.tolist() == [[0, 0, 500, 0, 100, 1]]
    torch.manual_seed(0)
    keys, values = torch.randn(33, 2, 16, 64), torch.randn(33, 2, 16, 64)
    query = torch.randn(100, 6, 64)
    compare(
        query,
        keys,
        values,
        lambda grouped: rows if grouped else PagedRows(**{**vars(rows), "grouped": False, "_derived": {}}),
    )


def test_nothing_is_grouped_where_nothing_is_shared():
    rows = PagedRows(4, 2, np.ones(2, np.int64), np.array([9, 7]), np.array([[1, 2, 3], [4, 5, 0]]), torch.zeros(2))
    assert groups.build_groups(rows) is None


@pytest.mark.parametrize("seed", range(40))
def test_one_row_alone_has_the_groups_of_many(seed):
    """What is found for it in fewer steps is what would be found beside another row."""
    rng = np.random.default_rng(seed)
    count, past, size = int(rng.integers(1, 40)), int(rng.integers(0, 400)), 16
    pages = -(-(past + count) // size)
    table = np.arange(1, pages + 1)[None]
    lens, context = np.array([count]), np.array([past + count])
    tree = None
    if rng.random() < 0.5:
        visible = np.array([(1 << i) | 1 for i in range(count)]) if rng.random() < 0.7 else np.full(count, ALL)
        tree = TreeMask(visible, np.full(count, past), np.full(count, past))
    alone = PagedRows(size, int(count == 1 and tree is None), lens, context, table, torch.zeros(count), tree=tree)
    got, least = groups.build_groups(alone, 3), 4
    finder = groups._Finder(alone, least)
    finder.split([0], 0, 0)
    wanted = finder.groups() if count >= least and past + count >= groups.LEAST_CAUSAL else None
    assert (got is None) == (wanted is None)
    for name in ("own", "segments", "members", "part_start", "parts") if got is not None else ():
        assert np.array_equal(getattr(got, name), getattr(wanted, name)), name


def compare_alone(query, keys, values, rows, **settings):
    """With each query by itself: the reference takes a minute for long rows."""
    settings = {"scale": query.shape[-1] ** -0.5, **settings}
    got = paged_attention(query, keys, values, rows(True), **settings)
    alone = paged_attention(query, keys, values, rows(False), **settings)
    torch.testing.assert_close(got, alone, atol=5e-6, rtol=1e-5)


def prompt(count, past, heads, kv_heads, dim, value_dim, page_size, seed=0):
    """The chunk of one prompt behind `past` tokens, and what lies in pages that it has not."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pages = -(-(past + count) // page_size)
    table = rng.permutation(np.arange(1, pages + 1))[None]
    keys, values = (torch.randn(pages + 3, kv_heads, page_size, d) for d in (dim, value_dim))
    keys[[0, -1, -2]], values[[0, -1, -2]] = torch.nan, torch.nan

    def rows(grouped, first=0):
        lens, context, slots = np.array([count - first]), np.array([past + count]), torch.zeros(count - first)
        return PagedRows(page_size, 0, lens, context, table, slots, grouped=grouped)

    return torch.randn(count, heads, dim), keys, values, rows


LONG = [(6, 2, 64, 64), (4, 2, 128, 128), (3, 1, 96, 32), (8, 2, 64, 128), (2, 2, 128, 40)]


@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", LONG)
@pytest.mark.parametrize("page_size", [5, 16])
def test_long_prompts(products, heads, kv_heads, dim, value_dim, page_size):
    compare_alone(*prompt(101, 830, heads, kv_heads, dim, value_dim, page_size))


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"sinks": torch.linspace(-3, 3, 6)}])
def test_what_models_add_to_long_prompts(products, settings):
    compare_alone(*prompt(70, 900, 6, 2, 64, 64, 16), **settings)


@pytest.mark.parametrize("rows, shared, own", [(44, 1000, 20), (50, 800, 0), (46, 1011, 100), (90, 790, 3)])
def test_rows_that_share_a_long_prefix(products, rows, shared, own):
    rng = np.random.default_rng(rows)
    torch.manual_seed(rows)
    made = scene(rng, 16, 6, 2, 64, 64, [0, *[shared // 16] * (rows - 1)], [shared, *[max(own, 1)] * (rows - 1)])
    assert len(groups.build_groups(made[3](True), 3).segments) >= 2
    compare_alone(*made)


def test_a_prompts_queries_do_not_depend_on_those_beside_them(products):
    """Bit by bit, with products of tiles: a chunk's later queries by themselves."""
    if products == "float32":
        pytest.skip("there a line takes one of two orders of its sums")
    query, keys, values, rows = prompt(200, 900, 6, 2, 64, 64, 16)
    whole = paged_attention(query, keys, values, rows(True), scale=0.125)
    part = paged_attention(query[93:], keys, values, rows(True, 93), scale=0.125)
    assert torch.equal(whole[93:], part)


def test_numbers_of_any_size(products):
    """What is taken apart has the exponents of float32: large and tiny keys and values, and scores far apart."""
    query, keys, values, rows = prompt(34, 800, 4, 1, 64, 64, 16)
    for factor in (1e-30, 1e-3, 1e3, 1e30):
        scale = 0.125 * factor
        compare_alone(query, keys / factor, values, rows, scale=scale)
        got = paged_attention(query, keys / factor, values * factor, rows(True), scale=scale)
        wanted = paged_attention(query, keys, values, rows(False), scale=0.125)
        torch.testing.assert_close(got / factor, wanted, atol=5e-6, rtol=1e-5)
    sharp = reference.paged_attention(query.double(), keys.double(), values.double(), rows(False), scale=4.0)
    got = paged_attention(query, keys, values, rows(True), scale=4.0)
    torch.testing.assert_close(got, sharp.float(), atol=5e-5, rtol=1e-4)
