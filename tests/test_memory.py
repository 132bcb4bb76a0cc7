"""Pages and who holds them: laws after every call, and a machine beside a dict of lists."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged.memory import Memory, OutOfPages
from hf_paged.pages import PagePool
from hf_paged.store import KVStore, LayerShape


@pytest.mark.parametrize("pages", [1, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_begins_with_a_line_of_the_cache(pages, dtype):
    """Else each vector of it lies in two: seen with numpy's zeros as they come."""
    store = KVStore([LayerShape(2, 64, 64)] * 2, pages, 16, dtype)
    for tensor in (*store.keys, *store.values):
        assert tensor.data_ptr() % 64 == 0 and tensor.dtype == dtype and not tensor[-1].any()


def test_pool_hands_out_each_page_once():
    pool = PagePool(5)
    pages = pool.take(2) + pool.take(3)
    assert sorted(pages) == [1, 2, 3, 4, 5] and pool.free == 0 and pool.used == 5
    with pytest.raises(OutOfPages) as caught:
        pool.take(1)
    assert (caught.value.wanted, caught.value.free) == (1, 0)
    pool.check(dict.fromkeys(pages, 1))


def test_pool_takes_all_or_nothing():
    pool = PagePool(3)
    pool.take(2)
    with pytest.raises(OutOfPages):
        pool.take(2)
    assert pool.free == 1


def test_pool_counts_holders():
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.share(page)
    assert pool.count(page) == 2 and pool.sequences(page) == 2
    pool.release(page)
    assert pool.count(page) == 1 and pool.free == 1
    pool.release(page)
    assert pool.count(page) == 0 and pool.free == 2 and pool.freed() == [page]
    for call in (pool.share, pool.release):
        with pytest.raises(ValueError, match="is free"):
            call(page)


def test_pool_reuses_pages_before_it_touches_new_ones():
    pool = PagePool(100)
    pages = pool.take(10)
    for page in pages[3:6]:
        pool.release(page)
    pool.take(3)
    assert pool.highest == 10


def test_pool_needs_a_page():
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(0)


@pytest.mark.parametrize("holders", [{1: 1}, {1: 2, 2: 1}, {}])
def test_pool_check_sees_wrong_counts(holders):
    pool = PagePool(4)
    pool.take(2)
    with pytest.raises(AssertionError):
        pool.check(holders)


def test_pool_rebuild_keeps_what_is_held_and_frees_the_rest():
    pool = PagePool(9)
    pages = pool.take(6)
    held = {pages[1]: 2, pages[4]: 1}
    pool.rebuild(held)
    pool.check(held)
    assert pool.free == 7 and set(pool.freed()) == set(pages) - set(held)
    assert not set(pool.take(7)) & set(held)


def test_reserve_takes_what_is_needed_and_no_more():
    memory = Memory(10, 4)
    sequence = memory.open([0] * 20)
    for count, pages in ((3, 1), (1, 1), (1, 2), (8, 4)):
        assert memory.needed(sequence, count) == pages - len(sequence.pages)
        assert memory.reserve(sequence, count) == []
        memory.commit(sequence, count)
        assert len(sequence.pages) == pages
    assert sequence.computed == 13 and sequence.pending == 7 and memory.live_tokens == 13
    memory.check()


def test_reserve_without_commit_is_not_taken_twice():
    memory = Memory(4, 4)
    sequence = memory.open([0] * 8)
    memory.reserve(sequence, 5)
    memory.reserve(sequence, 5)
    assert memory.pool.used == 2


def test_reserve_that_does_not_fit_changes_nothing():
    memory = Memory(3, 2)
    parent = memory.open([0] * 3)
    memory.reserve(parent, 3)
    memory.commit(parent, 3)
    child = memory.fork(parent, [0] * 9)
    tables = list(parent.pages), list(child.pages)
    with pytest.raises(OutOfPages):
        memory.reserve(child, 3)  # a copy of the shared tail and one more
    assert (parent.pages, child.pages) == tables
    memory.check()


def test_fork_shares_and_the_first_writer_copies():
    memory = Memory(10, 4)
    parent = memory.open([0] * 8)
    memory.reserve(parent, 6)
    memory.commit(parent, 6)
    child = memory.fork(parent)
    assert child.pages == parent.pages and child.computed == 6 and memory.pool.used == 2
    assert memory.live_tokens == 6 and memory.waste() == pytest.approx(2 / 8)
    before = list(parent.pages)
    assert memory.needed(child, 1) == 1
    (copy,) = memory.reserve(child, 1)
    assert copy.source == before[1] and copy.target == child.pages[1] and child.pages[0] == before[0]
    assert parent.pages == before and memory.needed(parent, 1) == 0 and memory.reserve(parent, 1) == []
    memory.commit(child, 1)
    assert memory.live_tokens == 4 + 2 + 3
    memory.check()


def test_fork_at_a_page_boundary_copies_nothing():
    memory = Memory(10, 4)
    parent = memory.open([0] * 5)
    memory.reserve(parent, 4)
    memory.commit(parent, 4)
    child = memory.fork(parent)
    assert memory.reserve(child, 1) == [] and child.pages[0] == parent.pages[0] and child.pages[1:] != parent.pages[1:]


def test_fork_does_not_take_pages_that_are_only_reserved():
    memory = Memory(10, 4)
    parent = memory.open([0] * 12)
    memory.reserve(parent, 12)
    memory.commit(parent, 3)
    child = memory.fork(parent)
    assert len(child.pages) == 1
    memory.check()


def test_fork_refuses_other_tokens():
    memory = Memory(10, 4)
    parent = memory.open([1, 2, 3])
    memory.reserve(parent, 2)
    memory.commit(parent, 2)
    assert memory.fork(parent, [1, 2, 9]).computed == 2
    with pytest.raises(ValueError, match="begin with"):
        memory.fork(parent, [1, 9, 3])


def test_rollback_releases_pages_behind_the_length():
    memory = Memory(10, 4)
    sequence = memory.open([0] * 12)
    memory.reserve(sequence, 12)
    memory.commit(sequence, 10)
    memory.rollback(sequence, 4)
    assert sequence.computed == 4 and len(sequence.pages) == 1 and memory.pool.free == 9
    memory.rollback(sequence, 0)
    assert memory.pool.free == 10
    memory.check()


def test_rollback_into_a_shared_page_makes_the_next_write_a_copy():
    memory = Memory(10, 4)
    parent = memory.open([0] * 8)
    memory.reserve(parent, 8)
    memory.commit(parent, 8)
    child = memory.fork(parent)
    memory.rollback(child, 2)
    (copy,) = memory.reserve(child, 1)
    assert copy.source == parent.pages[0] and child.pages[0] != parent.pages[0]
    memory.check()


def test_rewriting_stored_tokens_copies_shared_pages():
    memory = Memory(10, 2)
    parent = memory.open([0] * 6)
    memory.reserve(parent, 6)
    memory.commit(parent, 6)
    child = memory.fork(parent)
    copies = memory.reserve(child, 3, start=1)
    assert [c.source for c in copies] == parent.pages[:2] and child.pages[2] == parent.pages[2]
    memory.check()


def test_close_frees_what_nobody_else_holds():
    memory = Memory(10, 4)
    parent = memory.open([0] * 9)
    memory.reserve(parent, 6)
    memory.commit(parent, 6)
    child = memory.fork(parent)
    memory.reserve(child, 3)
    own = [page for page in child.pages if page not in parent.pages]
    assert sorted(memory.close(child)) == sorted(own) and memory.close(child) == []
    memory.close(parent)
    memory.check()
    assert memory.pool.free == 10 and not memory.sequences and memory.waste() == 0.0


def test_bad_calls_are_refused():
    memory = Memory(4, 4)
    sequence = memory.open([0] * 6)
    memory.reserve(sequence, 4)
    for count in (-1, 5, 7):
        with pytest.raises(ValueError, match="cannot be committed"):
            memory.commit(sequence, count)
    for call in (lambda: memory.reserve(sequence, -1), lambda: memory.reserve(sequence, 1, start=1)):
        with pytest.raises(ValueError, match="count="):
            call()
    for length in (-1, 1):
        with pytest.raises(ValueError, match="length="):
            memory.rollback(sequence, length)
    memory.close(sequence)
    for call in (
        lambda: memory.reserve(sequence, 1),
        lambda: memory.fork(sequence),
        lambda: memory.rollback(sequence, 0),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_repair_after_an_interrupt_inside_a_method(monkeypatch):
    memory = Memory(8, 2)
    kept, lost = memory.open([0] * 4), memory.open([0] * 4)
    for sequence in (kept, lost):
        memory.reserve(sequence, 4)
        memory.commit(sequence, 4)
    monkeypatch.setattr(memory.pool, "release", lambda page: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        memory.close(lost)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        memory.check()
    memory.repair({kept, lost})
    memory.check()
    assert memory.sequences == {kept} and memory.pool.used == 2 and kept.computed == 4


class MemoryMachine(RuleBasedStateMachine):
    """`Memory` beside a dict of lists. A toy store, page → tokens, takes the writes, and is read back."""

    @initialize(pages=st.integers(1, 15), size=st.integers(1, 4))
    def start(self, pages, size):
        self.memory = Memory(pages, size)
        self.store = {page: [None] * size for page in range(pages + 1)}
        self.model = {}  # sequence → tokens whose KV is stored
        self.size = size

    def pick(self, data):
        return data.draw(st.sampled_from(list(self.model)), label="sequence")

    @rule()
    def open(self):
        self.model[self.memory.open([])] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), kept=st.integers(0, 9))
    def write(self, data, tokens, kept):
        """Reserve, write all, commit some: as a step does whose draft is partly rejected."""
        sequence = self.pick(data)
        sequence.tokens[sequence.computed :] = tokens
        self.reserve_and_write(sequence, tokens)
        kept = min(kept, len(tokens))
        self.memory.commit(sequence, kept)
        self.model[sequence] += tokens[:kept]

    @precondition(lambda self: any(self.model.values()))
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def rewrite(self, data, tokens):
        """Write over stored tokens: nobody who shares the pages may see it."""
        sequence = self.pick(data)
        start = data.draw(st.integers(0, sequence.computed), label="start")
        tokens = tokens[: sequence.computed - start]
        if self.reserve_and_write(sequence, tokens, start):
            sequence.tokens[start : start + len(tokens)] = tokens
            self.model[sequence][start : start + len(tokens)] = tokens

    def reserve_and_write(self, sequence, tokens, start=None):
        memory, pool = self.memory, self.memory.pool
        first = sequence.computed if start is None else start
        needed = memory.needed(sequence, len(tokens)) if start is None else None
        before = pool.free, list(sequence.pages)
        try:
            copies = memory.reserve(sequence, len(tokens), start)
        except OutOfPages:
            assert (pool.free, sequence.pages) == before and (needed is None or needed > pool.free)
            del sequence.tokens[sequence.computed :]
            tokens.clear()
            return False
        assert needed is None or before[0] - pool.free == needed
        for copy in copies:
            self.store[copy.target] = list(self.store[copy.source])
        for at, token in enumerate(tokens, first):
            page = sequence.pages[at // self.size]
            assert page and pool.count(page) == 1, "a shared page is written"
            self.store[page][at % self.size] = token
        return True

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rollback(self, data):
        sequence = self.pick(data)
        length = data.draw(st.integers(0, sequence.computed), label="length")
        self.memory.rollback(sequence, length)
        del self.model[sequence][length:], sequence.tokens[length:]
        assert len(sequence.pages) == self.memory.pages_for(length)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data):
        sequence, free = self.pick(data), self.memory.pool.free
        child = self.memory.fork(sequence)
        assert self.memory.pool.free == free
        self.model[child] = list(self.model[sequence])
        del child.tokens[child.computed :]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data):
        sequence, free = self.pick(data), self.memory.pool.free
        freed = self.memory.close(sequence)
        assert self.memory.pool.free == free + len(freed)
        for page in freed:
            self.store[page] = [None] * self.size
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def repair(self, data):
        """As after an interrupt: some sequences are given up, the others stay as they are."""
        kept = set(data.draw(st.lists(st.sampled_from(list(self.model)), unique=True), label="kept"))
        self.memory.repair(kept | {None})
        self.model = {sequence: tokens for sequence, tokens in self.model.items() if sequence in kept}

    @invariant()
    def laws(self):
        if not hasattr(self, "memory"):
            return
        memory, size = self.memory, self.size
        memory.check()
        assert memory.sequences == set(self.model)
        held = {page for sequence in self.model for page in sequence.pages}
        assert 0 not in held and memory.pool.free == memory.pool.num_pages - len(held)
        for sequence, tokens in self.model.items():
            stored = [self.store[page][slot] for page in sequence.pages for slot in range(size)]
            assert sequence.computed == len(tokens) and stored[: len(tokens)] == tokens
        live = {(s.pages[at // size], at % size) for s in self.model for at in range(s.computed)}
        assert memory.live_tokens == len(live)
        assert memory.waste() == pytest.approx(1 - len(live) / (len(held) * size) if held else 0.0)


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestMemoryMachineLong(MemoryMachine.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=60, deadline=None)
