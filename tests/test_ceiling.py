"""The speed that acceptance and costs allow: against every tree counted by hand."""

from __future__ import annotations

import itertools

import pytest
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from hf_paged import SamplingParams
from hf_paged.integrations.bench.ceiling import Ceiling, Source, Tree, ceiling
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.possible import lookup_sources
from hf_paged.integrations.bench.workload import Workload


def test_free_drafts_are_taken_to_the_end():
    """Forwards that cost the same whatever they compute: every draft counts."""
    best = ceiling(4, [Source(((0.5,), (0.5,), (0.5,)))], lambda tokens: 2.0, 100, overhead=0.0)
    assert best == Ceiling(4 * 1.875 / 2, (Tree(3, 3, 0.875),))


def test_drafts_that_cost_what_they_bring_are_left_out():
    by_token = [Source(((0.9,), (0.9,)))]
    assert ceiling(3, by_token, lambda tokens: tokens, 100, overhead=0.0) == Ceiling(1.0, (Tree(0, 0, 0.0),))
    assert ceiling(3, by_token, lambda tokens: tokens, 100, overhead=0.2).trees[0].depth == 0
    assert ceiling(3, by_token, lambda tokens: tokens, 100, overhead=5.0).trees[0].depth == 2


def test_a_tree_where_the_second_guess_is_better_than_a_deeper_one():
    source = Source(((0.5, 0.3), (0.25, 0.05)))
    trees = list(source.trees(10))
    assert [(tree.depth, tree.nodes) for tree in trees] == [(0, 0), (1, 1), (1, 2), (2, 2), (2, 3), (2, 4)]
    assert [tree.taken for tree in trees] == pytest.approx([0, 0.5, 0.8, 0.8, 1.0, 1.04])
    assert [(tree.depth, tree.nodes) for tree in source.trees(2)] == [(0, 0), (1, 1), (1, 2), (2, 2)]


def test_a_draft_model_is_paid_for_by_depth():
    odds = ((0.8,), (0.8,))
    cheap, dear = (Source(odds, draft=lambda tokens, price=price: price * tokens) for price in (0.01, 1.0))
    assert ceiling(2, [cheap], lambda tokens: 1.0, 100, 0.0).tokens_per_second == pytest.approx(2 * 2.44 / 1.04)
    assert ceiling(2, [dear], lambda tokens: 1.0, 100, 0.0) == Ceiling(2.0, (Tree(0, 0, 0.0),))


def test_only_rows_for_which_something_is_drafted_count():
    best = ceiling(10, [Source(((0.5,),), share=0.4)], lambda tokens: tokens / 10 if tokens > 14 else 1.0, 100, 0.0)
    assert best == Ceiling(pytest.approx(12.0), (Tree(1, 1, 0.5),))


def test_nothing_is_said_about_forwards_that_were_never_measured():
    asked = []

    def target(tokens):
        asked.append(tokens)
        return 1.0

    assert ceiling(4, [Source(((0.5,),) * 8)], target, 12, 0.0).trees[0].nodes == 2
    assert max(asked) == 12
    assert ceiling(16, [Source(((0.5,),) * 8)], target, 12, 0.0).trees[0].nodes == 0


ODDS = st.lists(st.lists(st.floats(0, 0.3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)


@given(ODDS, ODDS, st.integers(1, 8), st.floats(0, 1), st.floats(0.01, 2), st.floats(0, 2))
def test_no_tree_of_one_width_is_faster(first, second, batch, share, slope, price):
    """Two sources at once: the ceiling holds against all depths and widths of both."""

    def target(tokens):
        return 1.0 + slope * tokens

    def options(odds):
        yield 0, 0, 0.0
        for depth, width in itertools.product(range(1, len(odds) + 1), range(1, 4)):
            reach, taken = 1.0, 0.0
            for one in odds[:depth]:
                reach *= sum(one[:width])
                taken += reach
            yield depth, depth * width, taken

    sources = [Source(first, share), Source(second, 1 - share, lambda tokens: price)]
    best = ceiling(batch, sources, target, 1000, 0.1).tokens_per_second
    for (_, nodes, taken), (depth, more, gain) in itertools.product(options(first), options(second)):
        made = batch * (1 + share * taken + (1 - share) * gain)
        tokens = batch * (1 + share * nodes + (1 - share) * more)
        assert made / (target(tokens) + depth * price + 0.1) <= best * (1 + 1e-9)


def test_several_who_draft_for_nothing_share_what_a_step_can_take():
    """Of all their drafts those come first that are taken most often, whoever made them."""
    sources = [Source(((0.9,), (0.5,)), share=0.5), Source(((0.6,), (0.9,), (0.1,)), share=0.25)]
    best = ceiling(1, sources, lambda tokens: 1.0 if tokens <= 2 else 9.0, 100, 0.0)
    assert best == Ceiling(
        pytest.approx(1 + 0.5 * 0.9 + 0.25 * (0.6 + 0.54)), (Tree(1, 1, 0.9), Tree(2, 2, pytest.approx(1.14)))
    )


def test_what_lookup_could_give_is_measured_behind_every_match():
    """An adaptive engine drafts deep where it is sure; here odds of deep drafts are those of all matches alike."""
    model = tiny_llama(vocab_size=5)
    load = Workload([[2, 3, 4] * 5, [4, 2, 2, 3] * 3], (120, 90))
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in load.lengths]
    found = lookup_sources(Loaded("tiny", model, None), load, params, {"page_size": 4})
    assert 0 < sum(source.share for source in found) <= 1
    assert max(len(source.odds) for source in found) == 16 and all(0 <= odds[0] <= 1 for s in found for odds in s.odds)
