"""Rows of a decode that have pages in common: which, and one program that reads a split for several of them."""

from __future__ import annotations

from dataclasses import replace

import interpreter  # noqa: F401  (before Triton is imported)
import numpy as np
import pytest
import torch
from interpreter import exact_products  # noqa: F401  (a fixture)
from kernel_cases import Case, Step, make
from test_triton_kernels import interpreted, small_tiles  # noqa: F401  (a fixture)

from hf_paged.kernels import paged_attention, worklist
from hf_paged.kernels.worklist import shared_pages

pytest.importorskip("triton")
from hf_paged.kernels import decode as decode_module  # noqa: E402
from hf_paged.kernels import triton_path  # noqa: E402
from hf_paged.kernels.splits import most_splits, split_count, split_size  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1, set where there is no GPU"),
    pytest.mark.usefixtures("exact_products"),
]


@pytest.fixture
def always(monkeypatch):
    """However few slots are shared."""
    monkeypatch.setattr(worklist, "LEAST_SHARED", 1)
    monkeypatch.setattr(worklist, "LEAST_SHARE", 0.0)


# -- splits


@pytest.mark.parametrize("split, full, block", [(1024, 16, 64), (1024, 33, 64), (128, 1, 128), (32, 7, 16)])
def test_splits_are_alike_for_rows_of_like_length(split, full, block):
    """Few sizes, in steps, twice the smallest at most; none but the last differs; never more than the grid has."""
    sizes = []
    for slots in range(0, 5 * full * split, 17):
        size = split_size(slots, split, full, block)
        count = split_count(slots, size)
        assert size % block == 0 and split <= size < 2 * split + block
        last = slots - (count - 1) * size
        assert last <= size * 3 // 2 and (count == 1 or last > size // 2)
        assert count <= most_splits(slots, split, full, block) <= most_splits(slots + 1000, split, full, block)
        assert slots > full * split or size == split
        sizes.append(size)
    assert sizes == sorted(sizes) and len(set(sizes)) <= 5


# -- which rows


def test_rows_stand_beside_those_with_the_same_first_pages(always):
    table = np.array([[7, 8, 9, 3], [1, 2, 4, 0], [7, 8, 5, 6], [1, 2, 4, 8], [7, 8, 9, 9]])
    order, common = shared_pages(table, np.array([16, 11, 14, 13, 15]), 4)
    rows = [table[row] for row in order]
    assert sorted(order) == [0, 1, 2, 3, 4] and common[0] == 0
    together = {(int(a), int(b)): int(c) for a, b, c in zip(order, order[1:], common[1:], strict=False)}
    # 11 slots are two whole pages: the third page of rows 1 and 3 is not full in one of them.
    assert together.get((1, 3), together.get((3, 1))) == 2
    assert sum(rows[i][0] != rows[i + 1][0] for i in range(4)) == 1
    assert together.get((0, 4), together.get((4, 0))) == 3


def test_few_shared_slots_are_read_row_by_row(monkeypatch):
    table, context = np.array([[1, 2, 3], [1, 2, 4]]), np.array([12, 12])
    assert shared_pages(table, context, 4) is None  # not worth a kernel of its own
    monkeypatch.setattr(worklist, "LEAST_SHARED", 8)
    monkeypatch.setattr(worklist, "LEAST_SHARE", 0.3)
    assert shared_pages(table, context, 4) is not None
    monkeypatch.setattr(worklist, "LEAST_SHARE", 0.5)
    assert shared_pages(table, context, 4) is None
    assert shared_pages(table[:1], context[:1], 4) is None
    assert shared_pages(np.array([[1, 2], [3, 2]]), np.array([8, 8]), 4) is None


# -- the kernel


def step_of(lengths: list[int], shares: list[tuple[int, int, int]], **options) -> Step:
    """Decodes over so many slots; each of `shares` `(row, other, pages)` puts another row's first pages into a row."""
    step = make(Case(rows=tuple((length - 1, None) for length in lengths), **options))
    for row, other, pages in shares:
        step.rows.page_table[row, :pages] = step.rows.page_table[other, :pages]
    return step


def attention(step: Step, grouped: bool) -> torch.Tensor:
    rows = replace(step.rows, grouped=grouped, _derived={})
    return paged_attention(step.query, step.keys, step.values, rows, **step.options)


SHARES = [(1, 0, 5), (2, 0, 6), (3, 0, 5), (4, 0, 3), (6, 5, 6), (7, 0, 4)]
LENGTHS = [110, 95, 120, 100, 60, 110, 105, 70, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"group": 1},
        {"group": 2, "dim": 64, "value_dim": 64},
        {"group": 3, "sinks": True},
        {"group": 4, "softcap": 5.0},
        {"group": 2, "dim": 20, "value_dim": 40},
        {"group": 2, "window": 70},
    ],
    ids=str,
)
def test_shared_splits_change_no_bit(options, small_tiles, always):  # noqa: F811
    step = step_of(LENGTHS, SHARES, **options)
    apart = attention(step, grouped=False)
    assert torch.equal(attention(step, grouped=True), apart)
    torch.testing.assert_close(apart, step.expected(), atol=2e-5, rtol=2e-5)


def test_a_shared_split_is_read_once(small_tiles, always, monkeypatch):  # noqa: F811
    """Rows that stand behind another one do not look up pages of splits that both have."""
    step = step_of([150, 131, 170], [(1, 0, 8), (2, 0, 8)], group=2)
    wanted = attention(step, grouped=False)
    first = shared_pages(step.rows.page_table, step.rows.context_lens, step.rows.page_size)[0][0]
    shared = 3 * 32 // step.rows.page_size  # the fourth split, of 35 slots, is the shortest row's own
    prepare = triton_path.step_tensors

    def spoilt(rows, device):
        made = prepare(rows, device)
        others = [row for row in range(3) if row != first]
        made.table[others, :shared] = 0  # whose slots are NaN
        return made

    monkeypatch.setattr(triton_path, "step_tensors", spoilt)
    assert torch.equal(attention(step, grouped=True), wanted)
    assert attention(step, grouped=False).isnan().any()


def test_rows_of_different_splits_share_none(small_tiles, always, monkeypatch):  # noqa: F811
    """A long row has larger splits than a short one, though all pages of the short one are its own too."""
    monkeypatch.setattr(decode_module, "full_splits", lambda *_: 2)
    step = step_of([60, 140, 300], [(1, 0, 3), (2, 1, 8)], group=2)
    apart = attention(step, grouped=False)
    assert torch.equal(attention(step, grouped=True), apart)
    torch.testing.assert_close(apart, step.expected(), atol=2e-5, rtol=2e-5)
