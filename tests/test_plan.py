"""The packed inputs of a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make, random_case

from hf_paged.kernels import paged_attention
from hf_paged.kernels.rows import ALL
from hf_paged.memory import Memory
from hf_paged.plan import PlanRow, StepPlan, build_plan


def planned(memory, tokens, computed, count, logits=1):
    """A row with `computed` stored tokens that computes `count` more."""
    sequence = memory.open(tokens)
    memory.reserve(sequence, computed)
    memory.commit(sequence, computed)
    memory.reserve(sequence, count)
    return PlanRow(None, sequence, count, logits)


def test_one_prompt():
    memory = Memory(8, 4)
    row = planned(memory, [5, 6, 7, 8, 9, 10], 0, 6)
    plan = build_plan([row], 4)
    first, second = row.sequence.pages
    assert plan.tokens == 6 and plan.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 5] and plan.logits_at.tolist() == [5]
    assert plan.rows.slots.tolist() == [4 * first + i for i in range(4)] + [4 * second, 4 * second + 1]
    assert plan.rows.num_decodes == 0 and plan.rows.context_lens.tolist() == [6]
    assert {t.dtype for t in (plan.token_ids, plan.positions, plan.logits_at, plan.rows.slots)} == {torch.int64}


def test_decodes_before_chunks():
    memory = Memory(20, 4)
    rows = [
        planned(memory, list(range(9)), 8, 1),
        planned(memory, [50, 51], 1, 1),
        planned(memory, list(range(20, 30)), 3, 5, logits=0),
        planned(memory, list(range(60, 64)), 0, 4, logits=4),
    ]
    plan = build_plan(rows, 4)
    assert plan.token_ids.tolist() == [8, 51, 23, 24, 25, 26, 27, 60, 61, 62, 63]
    assert plan.positions.tolist() == [8, 1, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert plan.logits_at.tolist() == [0, 1, 7, 8, 9, 10]
    assert plan.rows.num_decodes == 2
    assert plan.rows.query_lens.tolist() == [1, 1, 5, 4] and plan.rows.context_lens.tolist() == [9, 2, 8, 4]
    assert plan.rows.page_table.shape == (4, 3) and (plan.rows.page_table[1, 1:] == 0).all()


def test_no_logits_at_all():
    plan = build_plan([planned(Memory(4, 4), [1, 2, 3], 0, 2, logits=0)], 4)
    assert plan.logits_at.shape == (0,) and plan.logits_at.dtype == torch.int64


def test_a_decode_behind_a_chunk_is_refused():
    memory = Memory(8, 4)
    rows = [planned(memory, [1, 2, 3], 0, 3), planned(memory, [1, 2], 1, 1)]
    with pytest.raises(ValueError, match="one token must come first"):
        build_plan(rows, 4)


cases = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(cases=cases, size=st.integers(1, 5))
def test_against_the_obvious(cases, size):
    """Every field, token by token."""
    memory = Memory(200, size)
    cases.sort(key=lambda case: case[1] > 1)
    rows = [
        planned(memory, [100 * i + j for j in range(done + count)], done, count, min(logits, count))
        for i, (done, count, logits) in enumerate(cases)
    ]
    plan = build_plan(rows, size)
    tokens, positions, slots, wanted = [], [], [], []
    for row in rows:
        done, pages = row.sequence.computed, row.sequence.pages
        for at in range(done, done + row.count):
            if at >= done + row.count - row.logits:
                wanted.append(len(tokens))
            tokens.append(row.sequence.tokens[at])
            positions.append(at)
            slots.append(pages[at // size] * size + at % size)
    assert (plan.token_ids.tolist(), plan.positions.tolist()) == (tokens, positions)
    assert (plan.rows.slots.tolist(), plan.logits_at.tolist()) == (slots, wanted)
    for table, row in zip(plan.rows.page_table, rows, strict=True):
        pages = row.sequence.pages
        assert table[: len(pages)].tolist() == pages and not np.any(table[len(pages) :])


def test_derived_values_are_made_once():
    plan = build_plan([planned(Memory(4, 4), [1], 0, 1)], 4)
    made = []
    for _ in range(3):
        plan.rows.derived("key", lambda: made.append(1))
    assert plan.rows.derived("other", lambda: 7) == 7 and made == [1]


@pytest.mark.parametrize("seed", range(12))
def test_wanted_rows_attend_as_all_of_them_do(seed):
    """Of decodes, chunks and trees the last tokens alone, and rows of which none is wanted."""
    rng = np.random.default_rng(seed)
    step = make(random_case(rng, ["any", "tree", "decode", "extend"][seed % 4], longest=40, dims=(8, 16)))
    lens, tree = step.rows.query_lens, step.rows.tree
    ends = lens.cumsum()
    branches = np.zeros(len(lens), bool)
    if tree is not None:
        branches = (lens > 0) & (np.append(tree.visible, ALL)[ends - lens] != ALL)
    counts = np.where(branches, lens, np.minimum(rng.integers(0, 4, len(lens)), lens))
    at = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    if not len(at):
        return
    at = torch.from_numpy(at)
    tokens = torch.zeros(int(lens.sum()), dtype=torch.long)
    plan = StepPlan(tokens, tokens, at, replace(step.rows, slots=tokens, _derived={}))
    got = paged_attention(step.query[at], step.keys, step.values, plan.wanted(), **step.options)
    torch.testing.assert_close(got, step.expected()[at], atol=2e-5, rtol=2e-5)
