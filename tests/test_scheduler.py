"""`decide`: what it is shown in, a value out."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.memory import Memory
from hf_paged.outputs import RequestMetrics
from hf_paged.params import SamplingParams
from hf_paged.request import Request
from hf_paged.scheduler import WINDOW, Limits, decide
from hf_paged.supply import Supply

PAGE = 4


@dataclass
class Scene:
    """Rows over a memory; what `decide` is shown."""

    pages: int = 100
    tokens: int = 64
    rows: int = 8
    memory: Memory = None
    running: list = field(default_factory=list)
    waiting: list = field(default_factory=list)
    looked_at: int = 0
    number: int = 0

    def __post_init__(self):
        self.memory = Memory(self.pages, PAGE)

    def request(self, length, priority=0.0, n=1):
        params = SamplingParams(priority=priority, n=n)
        request = Request(f"r{self.number}", self.number, None, [1] * length, params, 16, RequestMetrics(0.0))
        self.number += 1
        request.add_rows(0, None, ())
        return request.rows[0]

    def wait(self, length, priority=0.0, n=1):
        row = self.request(length, priority, n)
        self.waiting.append(row)
        self.waiting.sort(key=lambda row: row.order)
        return row

    def run(self, length, computed, priority=0.0):
        """A row with pages for its computed tokens."""
        row = self.request(length, priority)
        row.sequence = self.memory.open(row.tokens)
        self.memory.reserve(row.sequence, computed)
        self.memory.commit(row.sequence, computed)
        self.running.append(row)
        return row

    def look(self):
        for row in self.waiting:
            self.looked_at += 1
            yield row

    def decide(self):
        limits = Limits(self.tokens, self.rows, self.memory.pool.free, PAGE)
        decision = decide(self.running, self.look(), limits, Supply(self.memory))
        check(self, decision)
        return decision


def rows_in(works):
    return [work.row for work in works]


def check(scene, decision):
    """What holds of any decision."""
    counts = [work.count for work in decision.work]
    rows = [work.row for work in decision.work]
    assert len(set(map(id, rows))) == len(rows) and sum(counts) <= scene.tokens and len(rows) <= scene.rows
    assert all(counts) and counts == sorted(counts, key=lambda count: count > 1), "rows with one token come first"
    assert rows_in(decision.admitted) == scene.waiting[: len(decision.admitted)], "admitted in order, none passed over"
    assert all(work in decision.work for work in decision.admitted)
    assert not set(map(id, decision.preempted)) & set(map(id, rows))
    assert not (decision.preempted and decision.admitted)
    free = scene.memory.pool.free + sum(len(row.sequence.pages) for row in decision.preempted)
    for work in decision.work:
        known = work.row.sequence.pending if work.row.sequence else len(work.row.tokens)
        assert work.count <= known
        free -= scene.memory.needed(work.row.sequence, work.count) if work.row.sequence else -(-work.count // PAGE)
    assert free >= 0


def counts_of(decision):
    return sorted((work.row.request.number, work.count) for work in decision.work)


def test_nothing_to_do():
    decision = Scene().decide()
    assert decision.work == decision.admitted == decision.preempted == ()


def test_decodes_come_first_and_prompts_take_what_is_left():
    scene = Scene(tokens=10)
    scene.run(20, 8)
    scene.run(9, 8)
    scene.run(5, 4)
    scene.wait(3)
    assert counts_of(scene.decide()) == [(0, 8), (1, 1), (2, 1)]


def test_prompts_are_cut_to_the_budget():
    scene = Scene(tokens=10)
    scene.wait(25)
    scene.wait(5)
    decision = scene.decide()
    assert counts_of(decision) == [(0, 10)] and len(decision.admitted) == 1


def test_several_prompts_fit_one_step():
    scene = Scene(tokens=10)
    for length in (4, 3, 1, 9):
        scene.wait(length)
    assert counts_of(scene.decide()) == [(0, 4), (1, 3), (2, 1), (3, 2)]


def test_a_budget_below_the_number_of_rows_serves_the_first():
    scene = Scene(tokens=2)
    for _ in range(4):
        scene.run(5, 4)
    assert counts_of(scene.decide()) == [(0, 1), (1, 1)]


def test_no_more_rows_than_allowed():
    scene = Scene(rows=3)
    scene.run(5, 4)
    for _ in range(4):
        scene.wait(2)
    assert len(scene.decide().admitted) == 2


def test_priority_goes_before_arrival():
    scene = Scene(tokens=3)
    scene.run(9, 4)
    first = scene.run(5, 4, priority=-1)
    late = scene.run(9, 4, priority=-2)
    assert {w.row for w in scene.decide().work} == {first, late}
    scene = Scene(rows=1)
    scene.wait(2)
    urgent = scene.wait(2, priority=-1)
    assert rows_in(scene.decide().admitted) == [urgent]


def test_the_last_row_is_preempted():
    scene = Scene(pages=4)
    for _ in range(3):
        scene.run(5, 4)
    decision = scene.decide()
    assert [row.request.number for row in decision.preempted] == [2] and counts_of(decision) == [(0, 1), (1, 1)]


def test_preemption_respects_priority():
    scene = Scene(pages=2)
    scene.run(5, 4)
    scene.run(5, 4, priority=-1)
    decision = scene.decide()
    assert [row.request.number for row in decision.preempted] == [0] and counts_of(decision) == [(1, 1)]


def test_a_row_may_preempt_itself():
    scene = Scene(pages=4)
    scene.run(4, 3)
    scene.run(9, 8)
    scene.run(4, 3)
    scene.running[2].tokens.append(1)
    scene.running[2].tokens.append(1)
    decision = scene.decide()
    assert [row.request.number for row in decision.preempted] == [2]
    assert counts_of(decision) == [(0, 1), (1, 1)]


def test_pages_granted_to_a_victim_go_back():
    """A decode that was given the last page is thrown out by a prompt of higher rank; its page and token serve that."""
    scene = Scene(pages=5, tokens=8)
    scene.run(13, 8, priority=-1)  # a prompt: 5 tokens to go, two pages
    scene.run(9, 8)  # decodes, on a fresh page
    decision = scene.decide()
    assert [row.request.number for row in decision.preempted] == [1] and counts_of(decision) == [(0, 5)]


def test_admission_waits_for_pages():
    scene = Scene(pages=4)
    scene.run(8, 7)
    scene.wait(9)
    scene.wait(1)
    assert scene.decide().admitted == (), "the first does not fit, and nobody overtakes it"
    scene.waiting.pop(0)
    assert len(scene.decide().admitted) == 1


def test_nobody_is_admitted_while_rows_are_thrown_out():
    scene = Scene(pages=4)
    scene.run(5, 4)
    scene.run(13, 12)
    scene.wait(1)
    decision = scene.decide()
    assert len(decision.preempted) == 1 and not decision.admitted


def test_rows_of_one_request_need_places():
    scene = Scene(rows=4)
    scene.run(5, 4)
    scene.wait(3, n=4)
    assert scene.decide().admitted == ()
    scene.running.clear()
    assert len(scene.decide().admitted) == 1
    scene = Scene(rows=4)
    scene.wait(3, n=9)
    assert len(scene.decide().admitted) == 1, "more rows than places: they take turns"


def test_a_whole_pool_can_be_filled_by_one_prompt():
    scene = Scene(pages=2)
    scene.wait(8)
    assert counts_of(scene.decide()) == [(0, 8)]


@pytest.mark.parametrize("free", [True, False])
def test_a_long_queue_is_read_only_as_far_as_needed(free):
    scene = Scene(rows=8 if free else 3)
    for _ in range(3):
        scene.run(5, 4)
    scene.waiting = [scene.request(2) for _ in range(10_000)]
    admitted = len(scene.decide().admitted)
    assert admitted == (5 if free else 0) and scene.looked_at <= WINDOW


rows_of = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.sampled_from([-1.0, 0.0, 2.0])), max_size=6)


@settings(max_examples=200, deadline=None)
@given(running=rows_of, waiting=rows_of, tokens=st.integers(1, 20), rows=st.integers(1, 8), spare=st.integers(0, 6))
def test_any_scene(running, waiting, tokens, rows, spare):
    """Laws of every decision, and: the row that goes first among those that run is never thrown out, nor left idle."""
    running = running[:rows]
    held = sum(-(-min(computed, length - 1) // PAGE) for length, computed, _ in running)
    longest = max((-(-length // PAGE) for length, _, _ in running + waiting), default=1)
    scene = Scene(pages=max(held + spare, longest), tokens=tokens, rows=rows)
    for length, computed, priority in running:
        scene.run(length, min(computed, length - 1), priority)
    for length, _, priority in waiting:
        scene.wait(length, priority)
    decision = scene.decide()
    if running:
        first = min(scene.running, key=lambda row: row.order)
        assert first not in decision.preempted
    assert bool(decision.work) == bool(running or waiting)
