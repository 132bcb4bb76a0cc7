"""Bad input at the door of the ops: refused by name, whatever would have computed it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_paged.kernels import PagedRows, paged_attention, write_kv
from hf_paged.kernels.rows import ALL, TreeMask

BACKENDS = ["auto", "torch"]
SIZE, PAGES, KV_HEADS, HEADS, DIM = 16, 4, 2, 4, 64


def rows_of(contexts=(20,), queries=(1,), table=((1, 2),), decodes=1, slots=None, **options):
    slots = [0] * sum(queries) if slots is None else slots
    arrays = (np.array(part, np.int64) for part in (queries, contexts, table))
    return PagedRows(SIZE, decodes, *arrays, torch.tensor(slots, dtype=torch.long), **options)


def pages_of(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*(shape or (PAGES, KV_HEADS, SIZE, DIM)))


def attend(rows, query=None, keys=None, values=None, **options):
    query = torch.randn(int(rows.query_lens.sum()), HEADS, DIM) if query is None else query
    keys, values = pages_of() if keys is None else keys, pages_of(seed=1) if values is None else values
    return paged_attention(query, keys, values, rows, **{"scale": DIM**-0.5, **options})


STEPS = {
    "a page in sight is none": (dict(table=[[1, -1]]), "rows.page_table"),
    "a page that there is not": (dict(table=[[1, PAGES]]), "rows.page_table"),
    "fewer pages than the context has": (dict(table=[[1]]), "rows.page_table"),
    "a decode of five queries": (dict(queries=[5]), "rows.query_lens"),
    "more decodes than rows": (dict(decodes=2), "rows.num_decodes"),
    "more queries than the row sees": (dict(contexts=[3], queries=[5], decodes=0), "rows.context_lens"),
    "queries below zero": (dict(contexts=[20, 20], queries=[2, -1], table=[[1, 2]] * 2, decodes=0), "rows.query_lens"),
    "lengths that differ": (dict(contexts=[20, 20]), "lengths of"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("given", "name"), STEPS.values(), ids=STEPS)
def test_a_step_that_makes_no_sense(backend, given, name):
    with pytest.raises(ValueError, match=rf"^{name}"):
        attend(rows_of(**given, backend=backend))


ARGUMENTS = {
    "window": dict(window=0),
    "softcap": dict(softcap=0.0),
    "scale": dict(scale=float("nan")),
    "sinks": dict(sinks=torch.zeros(2)),
    "query's heads": dict(query=torch.zeros(1, 5, DIM)),
    "query's head_dim": dict(query=torch.zeros(1, HEADS, 32)),
    "sum of rows.query_lens": dict(query=torch.zeros(2, HEADS, DIM)),
    "value_pages.shape": dict(values=pages_of(PAGES, 1, SIZE, DIM)),
    "value_pages.dtype": dict(values=pages_of().half()),
    "rows.page_size": dict(keys=pages_of(PAGES, KV_HEADS, 8, DIM), values=pages_of(PAGES, KV_HEADS, 8, DIM)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "given"), ARGUMENTS.items(), ids=ARGUMENTS)
def test_arguments_that_do_not_go_together(backend, name, given):
    with pytest.raises(ValueError, match=rf"^{name}"):
        attend(rows_of(backend=backend), **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_behind_a_row_is_not_looked_at(backend):
    query, good = torch.randn(1, HEADS, DIM), rows_of(table=[[1, 2, 0]], backend=backend)
    wild = replace(good, page_table=np.array([[1, 2, -1]]), _derived={})
    assert torch.equal(attend(good, query), attend(wild, query))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, dict(softcap=5.0), dict(sinks=torch.zeros(HEADS))])
def test_rows_without_queries_are_passed_over(backend, options):
    query, table = torch.randn(3, HEADS, DIM), [[1, 2], [3, 0], [2, 1]]
    tree = TreeMask(np.full(3, ALL), np.array([18, 18, 18]), np.array([18, 19, 20]))
    for mask in (None, tree):
        alone = rows_of([21], [3], table[:1], 0, backend=backend, tree=mask)
        beside = rows_of([21, 9, 0], [3, 0, 0], table, 0, backend=backend, tree=mask)
        torch.testing.assert_close(attend(beside, query, **options), attend(alone, query, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_keys_go_to_their_slots_and_nowhere_else(backend):
    keys, values = pages_of(), pages_of(seed=1)
    before, new = keys.clone(), torch.ones(3, KV_HEADS, DIM)
    write_kv(
        new, new, keys, values, rows_of(contexts=(20,), queries=(3,), decodes=0, slots=[17, -1, 5], backend=backend)
    )
    changed = (keys != before).any(3).any(1).view(-1).nonzero().view(-1)
    assert changed.tolist() == [5, 17]
    for slots, name in (([PAGES * SIZE], "rows.slots"), ([-2], "rows.slots"), ([1, 2], "key.shape")):
        with pytest.raises(ValueError, match=rf"^{name}"):
            write_kv(new[:1], new[:1], keys, values, rows_of(slots=slots, backend=backend))
