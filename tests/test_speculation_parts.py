"""Proposals, indices of texts, costs and trials, each by itself."""

from __future__ import annotations

import json
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import save_tiny
from engine_helpers import toy_core
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_paged.drafting import REST
from hf_paged.integrations.cli.app import app
from hf_paged.params import SamplingParams
from hf_paged.speculation.acceptance import Acceptance
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.cost import KNOWN, CostTable
from hf_paged.speculation.guide import Ledger, Overhead
from hf_paged.speculation.lookup import NgramIndex, continuation, lookup
from hf_paged.speculation.proposal import Proposal, Verdict, tree_places
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.stats import Tally
from hf_paged.speculation.suffix import SuffixIndex
from hf_paged.speculation.texts import Texts
from hf_paged.speculation.trial import TRIED, Trial

TREE = Proposal((5, 6, 7, 8, 9), (-1, -1, 0, 1, 1), (0,) * 5, (0.5, 0.4, 0.9, 0.5, 0.25), "test")


def test_a_tree():
    assert TREE.depths() == [1, 1, 2, 2, 2] and not TREE.is_chain
    assert TREE.reach() == pytest.approx([0.5, 0.4, 0.45, 0.2, 0.1])
    assert [TREE.child(-1, 6), TREE.child(1, 9), TREE.child(0, 9)] == [1, 4, None]
    picked = TREE.pick([1, 4, 0]).pick([0, 1])
    assert (picked.tokens, picked.parents, picked.origin, picked.is_chain) == ((6, 9), (-1, 0), (1, 4), True)
    span = TREE.span(3, 10)
    assert span.token_ids == (3, 5, 6, 7, 8, 9) and span.positions == (10, 11, 11, 12, 12, 12)
    assert [bin(bits) for bits in span.visible] == ["0b1", "0b11", "0b101", "0b1011", "0b10101", "0b100101"]
    assert tree_places((), 4) == ((4,), (1,))


def test_what_was_judged():
    assert Verdict(TREE, (1,)).judged() == [(0, False), (1, True), (3, False), (4, False)]
    assert Verdict(TREE, (1,), ended=True).judged() == [(0, False), (1, True)]
    assert Verdict(TREE, ()).judged() == [(0, False), (1, False)]


def test_what_is_counted():
    """Of the tree: 5 and 6 first, 7 behind 5, 8 and 9 behind 6."""
    assert Verdict(TREE, (1, 4)).ranks() == [1, 2] and Verdict(TREE, (0,)).ranks() == [0]
    tally, other = Tally(), Tally()
    for verdict in (Verdict(TREE, (1, 4)), Verdict(TREE, (0,)), Verdict(TREE, ())):
        tally.add(verdict)
    other.add(Verdict(TREE, (1,), ended=True))
    tally.include(other)
    stats = tally.stats()
    assert (stats.proposals, stats.proposed, stats.accepted) == (4, 20, 4)
    assert stats.by_depth == (3 / 4, 1 / 2) and stats.by_rank == ((1 / 4, 2 / 4), (0, 0, 1 / 2))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 6))
def test_lookup_finds_the_longest_ngram(tokens, size, count):
    index = NgramIndex(size)
    for end in range(1, len(tokens) + 1):  # as the row grows
        found = lookup(index, tokens[:end], count)
    end = len(tokens)
    sizes = [(n, at) for n in range(1, size + 1) for at in range(n, end)]
    longest = [n for n, at in sizes if tokens[at - n : at] == tokens[end - n :]]
    assert (found is None) == (not longest)
    if found is not None:
        n = max(longest)
        starts = [at for at in range(n, len(tokens)) if tokens[at - n : at] == tokens[-n:]]
        assert list(found.tokens) == continuation(tokens, starts[-1], count) and len(found) == count


def test_a_continuation_goes_on_with_itself():
    assert continuation([1, 2, 3], 1, 5) == [2, 3, 2, 3, 2] and continuation([1, 2, 3], 0, 2) == [1, 2]


def test_suffixes_of_other_texts():
    index = SuffixIndex(64)
    for text in ([1, 2, 3, 4, 5, 6], [9, 2, 3, 4, 7, 8]):
        index.update(index.open(text, None))
    tree = index.propose(index.open([1, 2, 3, 4], None), 3, 4)
    assert set(tree.tokens[:2]) == {5, 7} and tree.tokens[0] == 5 and not tree.is_chain
    assert index.propose(index.open([1, 2, 3, 4], None), 3, 1).tokens[:2] == (5, 6)
    assert index.propose(index.open([1, 2, 3, 4], "tenant"), 3, 4) is None  # nothing crosses salts
    assert set(index.propose(index.open([4], None), 1, 4).tokens) == {5, 7}
    assert index.propose(index.open([8], None), 3, 4) is None  # nothing followed


def test_the_suffix_index_is_bounded():
    index = SuffixIndex(100)
    first = index.open(list(range(1000, 1050)), None)
    index.update(first)
    index.update(index.open(list(range(2000, 3000)), None))
    assert len(index) == index.size == 128
    assert index.propose(index.open([1000, 1001, 1002], None), 2, 1) is None
    assert index.propose(index.open([2990, 2991], None), 2, 1).tokens == (2992, 2993)


def test_a_text_that_shrinks():
    """A row is shortened after an interrupt."""
    index, tokens = SuffixIndex(64), [1, 2, 3, 1, 2, 3, 1, 2]
    text = index.open(tokens, None)
    assert index.propose(text, 4, 1).tokens == (3, 1, 2, 3)
    del tokens[4:]
    index.propose(text, 4, 1)
    ngrams = NgramIndex(3)
    lookup(ngrams, [1, 2, 1, 2, 1], 3)
    assert lookup(ngrams, [1, 2, 1], 3).tokens == (2, 1, 2)


def test_costs_between_measurements():
    table = CostTable()
    assert not table and table.seconds(5) == 0
    for _ in range(3):
        for tokens, seconds in ((1, 1.0), (5, 3.0), (3, 9.0)):
            table.note(tokens, seconds)
    assert table.seconds(1) == 1
    assert table.seconds(3) == table.seconds(5) == 6  # a smaller size never costs more than a larger one
    assert table.seconds(2) == pytest.approx(3.5)
    assert table.seconds(10) == pytest.approx(6 * 1.05)


def test_costs_follow_the_pace_of_the_machine():
    table = CostTable()
    for _ in range(20):
        for tokens, seconds in ((1, 1.0), (4, 1.1), (8, 1.5)):
            table.note(tokens, seconds)
    for _ in range(60):  # half as fast now, and sizes that are not seen are slower too
        table.note(4, 2.2)
    assert [table.seconds(size) for size in (1, 4, 8)] == pytest.approx([2.0, 2.2, 3.0], rel=0.06)
    for _ in range(60):
        table.note(1, 1.0)
    assert [table.seconds(size) for size in (1, 4, 8)] == pytest.approx([1.0, 1.1, 1.5], rel=0.06)


def test_costs_over_some_time():
    """What forwards took in all is what they cost at the mean pace, whatever the machine does in the end."""
    rng, table = np.random.default_rng(0), CostTable()
    true = {1: 1.0, 4: 1.1, 8: 1.5}

    def note(size: int, pace: float) -> float:
        table.note(size, true[size] * pace)
        return true[size] * pace

    for size in (*true, *true) * 10:
        note(size, 1.0)
    passed = table.passed
    assert table.pace_since(passed) == table.pace
    sizes = rng.choice(list(true), 900).tolist()
    spent = sum(note(size, 1.0 if at % 300 < 200 else 2.0) for at, size in enumerate(sizes))
    pace = table.pace_since(passed)
    assert sum(table.seconds(size, pace) for size in sizes) == pytest.approx(spent, rel=0.02)
    assert dict(table.points(pace))[4] == pytest.approx(1.1 * 4 / 3, rel=0.05) and table.seconds(4) > 2


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 2, 4)])
def test_costs_of_sizes_that_are_not_seen_stay(sizes):
    """Thousands of forwards whose seconds stray to one side only, as those of a busy machine do, move no other size."""
    rng, table = np.random.default_rng(0), CostTable()
    true = {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7, 33: 6.0}

    def note(size: int) -> None:
        table.note(size, true[size] * (1 + 0.03 * rng.random() + (rng.random() < 0.15) * rng.exponential()))

    for size in (*true, *true) * 10:
        note(size)
    for size in rng.choice(sizes, 6000).tolist():
        note(size)
    assert [table.seconds(size) for size in true] == pytest.approx(list(true.values()), rel=0.1)


def test_costs_where_a_change_of_size_costs_too():
    """A forward after one of another size takes longer; what is seen rarely does not seem the cheaper for it."""
    rng, table = np.random.default_rng(0), CostTable()
    true = {8: 1.0, 16: 1.7, 20: 2.0, 40: 3.5}
    for round in range(600):
        larger = int(rng.choice([16, 16, 16, 20, 20, 40])) if round > 6 else [16, 20, 40][round % 3]
        for place, size in enumerate((larger, *(8,) * 12)):
            table.note(size, true[size] * (1.2 if place == 1 else 1) * (1 + 0.05 * rng.random()))
    usual = table.seconds(8)
    assert [table.seconds(size) / usual for size in true] == pytest.approx(list(true.values()), rel=0.08)


def test_costs_of_sizes_that_come_one_by_one():
    """A size's first forwards vary as all do: taken for too quick, they raise the pace, and later sizes seem cheap."""
    off = []
    for seed in range(8):
        rng, table = np.random.default_rng(seed), CostTable()
        for round in range(150):
            drafted = 8 + rng.integers(1, 2 + min(round // 12, 16), 4)
            for size in (*(8,) * 12, *drafted.tolist()):
                table.note(size, size * max(0.8, 1 + 0.15 * rng.normal()))
        off += [table.seconds(size) / table.seconds(8) * 8 / size for size in range(9, 25)]
    assert np.mean(off) == pytest.approx(1, rel=0.04)


def test_which_forwards_are_known():
    table = CostTable()
    for _ in range(KNOWN):
        table.note(8, 1.0)
    assert not table.knows(8)  # the first one does not count
    table.note(8, 1.0)
    assert table.knows(8) and table.knows(20) and not table.knows(7)


@pytest.mark.parametrize("faster", [True, False])
def test_trials_find_out_what_is_faster(faster):
    trial, drafted = Trial(), []
    for _ in range(2000):
        drafted.append(trial.drafts(8))
        trial.note(1.0, 1.0 if drafted[-1] == faster else 2.0)
    assert {True, False} == set(drafted[: 3 * TRIED])
    assert drafted.count(faster) > 1900


@pytest.mark.parametrize("gain", [0.9, 1.2])
def test_trials_on_a_machine_that_stumbles(gain):
    """How many drafts are taken varies, and so does time: after some trials what pays is done nearly always."""
    shares = []
    for seed in range(20):
        rng, trial, drafted = np.random.default_rng(seed), Trial(), []
        for _ in range(3000):
            drafted.append(trial.drafts(1))
            cost = 1 + 0.15 * rng.random() + (rng.random() < 0.05) * rng.exponential(2)
            tokens = rng.uniform(1.2, 2.8) if drafted[-1] else 1.0
            trial.note(tokens, cost * 2 / gain if drafted[-1] else cost)
        shares.append(sum(drafted[600:]) / 2400)
    assert np.mean(shares) > 0.9 if gain > 1 else np.mean(shares) < 0.1


def test_trials_are_rare_where_catching_up_is_dear():
    trial, spent = Trial(), 0.0
    for _ in range(3000):
        first = not trial.drafts(32)
        cost = 1.0 if first else 30.0 if trial._now.fresh else 1.5
        spent += cost
        trial.note(1.0, cost)
    assert 3030 < spent < 3100


def test_bench_speculation(tmp_path):
    model = save_tiny(tmp_path / "model")
    command = ["bench", "speculation", "--model", model, "--draft", model, "--requests", "2", "--new-tokens", "6"]
    command += ["--batches", "1,2", "--repeats", "1", "--methods", "draft,lookup,suffix,auto", "--json"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["rows"]) == 2 * 5 + 3 and all(row["tokens_equal"] for row in report["rows"])
    told = [row for row in report["rows"] if "of_best" in row]
    assert "draft" in {row["engine"] for row in told}
    for row in told:
        assert row["tokens_per_second"] == pytest.approx(row["of_best"] * row["best_tokens_per_second"])
        assert set(row["best_trees"]) == set(row["proposers"]) and row["cost"]
    wrong = CliRunner().invoke(app, [*command, "-", "--methods", "magic"])
    assert wrong.exit_code != 0 and "magic" in wrong.output


def _ledger(rows: int, sizes: dict[int, float]) -> Ledger:
    table = CostTable()
    for _ in range(4):
        for tokens, seconds in sizes.items():
            table.note(tokens, seconds)
    return Ledger(table, Overhead(), rows, rows)


def test_what_a_token_is_worth_where_nobody_waits():
    """A step of one row takes 2, each row more 0.25: the last one to end keeps all others' time, the first its line."""
    ledger = _ledger(4, {1: 2.0, 2: 2.25, 3: 2.5, 4: 2.75, 8: 3.75})
    mean = 2.75 / 4
    assert ledger.values([100, 98, 102, 99]) == pytest.approx([1.0] * 4, rel=1e-6)  # they may end in any order
    assert ledger.values([200, 100, 50, 10]) == pytest.approx([2 / mean, *[0.25 / mean] * 3], rel=1e-6)
    first, second, *rest = ledger.values([100, 100, 20, 5])
    assert first == second == pytest.approx(2.25 / 2 / mean, rel=1e-6) and rest == pytest.approx([0.25 / mean] * 2)


def test_what_a_token_is_worth_before_small_steps_were_measured():
    ledger = _ledger(4, {4: 2.75, 8: 3.75})
    assert ledger.values([200, 100, 50, 10]) == pytest.approx([1.0] * 4)


def test_least_odds_of_use():
    """Of eight rows' steps a token more costs an eighth at least: a draft must be taken as often."""
    ledger = _ledger(8, {8: 1.0, 9: 2.0, 16: 2.0, 40: 5.0, 72: 9.0})
    assert ledger.cheapest == pytest.approx(8 * 1.0 / 8, rel=1e-3)
    index = NgramIndex(3)
    tokens = [1, 2, 3, 4, 1, 2, 3]
    assert lookup(index, tokens, 2, lambda kind: kind > 2) is None
    assert lookup(index, tokens, 2, lambda kind: kind == 2).tokens == (4, 1)


def test_texts_of_no_use_are_looked_at_together_and_rarely():
    rows = [SimpleNamespace(row=SimpleNamespace(drafting=None, output_ids=[1])) for _ in range(5)]
    texts, looks = Texts(SpeculationConfig(method="lookup"), Acceptance(), None), {}
    for step in range(1, 400):
        due = texts.due(rows[: 1 + step // 7], step)
        texts.put_off(due, (), step, 5)
        if due and step > 200:
            looks[step] = len(due)
    assert set(looks.values()) == {5} and 12 <= len(looks) <= 13
    texts.put_off(rows, rows, 400, 5)
    assert texts.due(rows, 401) == rows  # what paid once is looked at in the next step


def test_looks_of_no_use_take_a_hundredth_of_the_time():
    rows = [SimpleNamespace(row=SimpleNamespace(drafting=None, output_ids=[1])) for _ in range(8)]
    texts, spent = Texts(SpeculationConfig(method="auto"), Acceptance(), None), 0.0
    for step in range(1, 5001):
        due = texts.due(rows, step)  # nothing is put off, but for what cannot be paid
        assert len(due) in (0, 8)
        texts.looked(0.00124 if due else 0.0)
        spent += 0.00124 if due else 0.0
        texts.stepped(0.002)
    assert 0.005 < spent / (5000 * 0.002) < 0.012
    for _ in range(100):
        texts.paid(0.01)
    assert len(texts.due(rows, 5001)) == 8


def test_a_look_that_stumbles_does_not_bar_the_next_ones():
    rows = [SimpleNamespace(row=SimpleNamespace(drafting=None, output_ids=[1])) for _ in range(8)]
    texts = Texts(SpeculationConfig(method="auto"), Acceptance(), None)
    for seconds in (0.0008, 0.18, 0.0008):
        texts.looked(seconds, 8)
        texts.looked(1e-6, 0)  # a step in which no row was due
    assert texts.due(rows, 1) == rows
    for _ in range(9):  # looks that do take so long are charged more and more
        texts.looked(0.18, 8)
    assert texts.purse < -0.18 and not texts.due(rows, 1)


def test_where_there_is_nothing_to_do_most_steps_do_not_ask(monkeypatch):
    core, asked = toy_core(), []
    propose = Speculator.propose
    monkeypatch.setattr(Speculator, "propose", lambda self, *rest: asked.append(1) or propose(self, *rest))
    speculator = core.drafting.speculator(SpeculationConfig(method="lookup"))
    core.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=81), seed=0, speculator=speculator)
    speculator.texts.purse = -1.0
    while core.has_work:
        core.step()
    assert 20 <= len(asked) <= 30 and 76 <= speculator.steps <= 80  # of 80 that decode


def test_another_row_ends_a_rest():
    drafting = toy_core().drafting
    drafting._rest, drafting._rows = REST, 2
    assert [drafting._rests(rows) for rows in (2, 2, 3, 3)] == [True, True, False, False]
    drafting._rest = REST
    assert [drafting._rests(3) for _ in range(5)] == [True] * REST + [False] * 2


def test_compiled_chains_of_places_are_those_of_python():
    def proposals(compiled):
        index, rng = SuffixIndex(1 << 9), np.random.default_rng(0)
        index._op = index._op if compiled else None
        for length in (1, 2, 5, 7, 300, 40, 900, 3, 60):
            text = index.open(rng.integers(0, 9, length).tolist(), None)
            index.update(text)
            for _ in range(20):
                text.tokens.append(int(rng.integers(0, 9)))
                yield index.propose(text, 6, 3)
        yield [(list(chain.heads), list(chain.before)) for chain in index._chains]

    assert list(proposals(True)) == list(proposals(False))


def test_what_drafts_do_to_the_step_behind_them_is_counted():
    overhead = Overhead(step=1.0, drafts=0.5)
    for _ in range(200):
        overhead.note_after(3.3, 3.0)
    assert overhead.seconds(0) == 1.0 and overhead.seconds(1) == pytest.approx(1.8, rel=1e-3)


def test_a_first_trial_that_fails_is_soon_repeated():
    """Drafts that gain a third, on a machine that stumbled while they were tried first."""
    trial, drafted = Trial(), [False]
    for step in range(3000):
        drafted.append(trial.drafts(1))
        drafts = 20.0 if not drafted[-2] else 2.5 if step < 60 else 1.5  # the first of some catches up
        trial.note(2.0 if drafted[-1] else 1.0, drafts if drafted[-1] else 1.0)
    assert not any(drafted[60:300]) and np.mean(drafted[1200:]) > 0.9


@pytest.mark.parametrize("promise, rare", [(0.9, True), (1.1, False), (None, False)])
def test_a_trial_that_fails_as_expected_is_believed(promise, rare):
    """Where costs and odds had promised no more, it is not repeated as soon as where it surprises."""
    trial, drafted = Trial(), []
    for _ in range(2000):
        drafted.append(trial.drafts(8, None if promise is None else lambda: promise))
        trial.note(1.6 if drafted[-1] else 1.0, 10.0 if trial._now.fresh else 2.0 if drafted[-1] else 1.0)
    assert any(drafted[:20]) and any(drafted[50:600]) != rare


def test_a_trial_that_surprised_is_not_repeated_once_it_does_not():
    """Costs are known better by the time when it would be: they agree with what was seen."""
    trial, drafted = Trial(), []
    for step in range(2000):
        drafted.append(trial.drafts(8, lambda step=step: 1.1 if step < 100 else 0.9))
        trial.note(1.8 if drafted[-1] else 1.0, 10.0 if trial._now.fresh else 2.0 if drafted[-1] else 1.0)
    assert any(drafted[:20]) and not any(drafted[20:])


@pytest.mark.parametrize("gain", [0.5, 0.9])
def test_the_worse_a_trial_went_the_more_it_is_believed(gain):
    """Costs and odds still promise something; where drafts take twice as long as they gain, once is enough."""
    trial, drafted = Trial(), []
    for _ in range(900):
        drafted.append(trial.drafts(8, lambda: 1.05))
        trial.note(2 * gain if drafted[-1] else 1.0, 10.0 if trial._now.fresh else 2.0 if drafted[-1] else 1.0)
    assert any(drafted[:20]) and any(drafted[20:]) == (gain == 0.9)


def test_the_few_steps_of_a_trial_are_held_against_many():
    """Drafts lose a tenth against steps of which many are made at once; by themselves these take longer."""
    for usual, share in ((1.0, 0.0), (inf, 1.0)):
        trial, drafted = Trial(), []
        for _ in range(1000):
            drafted.append(trial.drafts(8))
            trial.note(1.8 if drafted[-1] else 1.0, 2.0 if drafted[-1] else 1.4, False, usual)
        assert np.mean(drafted) == pytest.approx(share, abs=0.2)


def test_what_steps_without_drafts_took_follows_the_pace():
    """While drafts are made, none of many steps without them is measured, but forwards are."""
    drafting = toy_core().drafting

    def step(rows: int, forward: float, seconds: float = 0.0) -> None:
        drafting.cost.note(rows, rows, forward)
        drafting._burst_rows = rows if seconds else 0
        drafting.speculators[None] = SimpleNamespace(stepped=lambda *_: None)
        drafting.stepped(seconds, 1)

    step(8, 1.0, 9.0)
    assert drafting._usual(8) == inf  # the first of a size is passed over
    for _ in range(20):
        step(8, 1.0, 1.2)
    assert drafting._usual(8) == pytest.approx(1.2) and drafting._usual(5) == pytest.approx(1.2)
    assert drafting._usual(16) == inf
    for _ in range(20):
        step(8, 2.0)
    assert drafting._usual(8) == pytest.approx(2.4, rel=0.1)


def test_no_trial_over_rows_that_are_about_to_end(monkeypatch):
    """It waits for others: the draft model would read their prompts for a token or two."""
    monkeypatch.setattr(Speculator, "_promise", lambda *_: 2.0)
    speculator = Speculator(SpeculationConfig(method="draft"), None, None)

    def tries(left: int) -> list[bool]:
        rows, drafted = [SimpleNamespace(row=SimpleNamespace(left=left))] * 8, []
        for _ in range(40):
            drafted.append(speculator.tries(None, 8, rows))
            speculator.trial.note(1.0, 1.0)
        return drafted

    assert not any(tries(2)) and any(tries(60))


@pytest.mark.parametrize("reads", [True, False])
def test_prompts_that_a_draft_model_reads_count(reads):
    """Drafts gain a tenth; every 40 steps the model reads prompts for as long as eight steps take: or it stumbles."""
    trial, drafted = Trial(), []
    for step in range(2000):
        drafted.append(trial.drafts(8))
        late = drafted[-1] and step % 40 == 0 and not trial._now.fresh
        trial.note(2.2 if drafted[-1] else 1.0, 10.0 if late else 2.0 if drafted[-1] else 1.0, bool(reads and late))
    assert np.mean(drafted[600:]) < 0.5 if reads else np.mean(drafted[600:]) > 0.8
