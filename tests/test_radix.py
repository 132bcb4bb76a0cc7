"""The radix tree beside a naive model: a dict of pages and the token tuples that end on them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_paged.radix import Node, RadixTree


def pages_of(nodes: list[Node]) -> list[int]:
    return [node.page for node in nodes]


class Naive:
    """What a tree should know: for each page the tokens up to its last one, and when it was used."""

    def __init__(self, page_size: int) -> None:
        self.size, self.known, self.used, self.clock = page_size, {}, {}, 0

    def begin(self, page: int) -> int:
        return (len(self.known[page]) - 1) // self.size * self.size

    def match(self, tokens: tuple[int, ...]) -> int:
        best = 0
        for page, path in self.known.items():
            common = 0
            for x, y in zip(path, tokens[:-1], strict=False):
                if x != y:
                    break
                common += 1
            if common > self.begin(page):
                best = max(best, common)
        return best

    def use(self, pages: list[int]) -> None:
        self.clock += 1
        self.used.update(dict.fromkeys(pages, self.clock))

    def leaves(self) -> list[int]:
        ancestors = {
            other
            for page, path in self.known.items()
            for other, shorter in self.known.items()
            if other != page and len(shorter) < len(path) and path[: len(shorter)] == shorter
        }
        return [page for page in self.known if page not in ancestors]


class Pair:
    """A tree and its model, driven together."""

    def __init__(self, page_size: int) -> None:
        self.tree, self.model, self.next_page = RadixTree(page_size, learn=False), Naive(page_size), 1

    def match(self, tokens: tuple[int, ...], touch: bool) -> None:
        found = self.tree.match(tokens)
        assert found == self.tree.match(tokens)
        assert found.length == self.model.match(tokens) <= max(len(tokens) - 1, 0)
        size = self.model.size
        assert len(found.pages) == -(-found.length // size)
        for index, page in enumerate(found.pages):
            shared = tokens[: min((index + 1) * size, found.length)]
            assert self.model.known[page][: len(shared)] == shared
        if touch and found.pages:
            self.tree.touch(found.last)
            self.model.use(found.pages)

    def insert(self, tokens: tuple[int, ...]) -> None:
        size, count = self.model.size, -(-len(tokens) // self.model.size)
        given = list(range(self.next_page, self.next_page + count))
        self.next_page += count
        before = self.model.match((*tokens, -1))
        out = self.tree.insert(tokens, given)
        for page in out.dropped:
            path = self.model.known.pop(page)
            assert tokens[: len(path)] == path
        for page in out.taken:
            self.model.known[page] = tokens[: (given.index(page) + 1) * size]
        assert self.model.match((*tokens, -1)) == len(tokens)
        assert len(out.taken) == count - (before // size if before < len(tokens) else count)
        path = [page for page in self.tree.match((*tokens, -1)).pages]
        if path:
            self.model.use(path)

    def evict(self, count: int, held: set[int]) -> None:
        def free(page: int) -> bool:
            return page not in held

        for page in pages_of(self.tree.evict(count, free)):
            leaves = [leaf for leaf in self.model.leaves() if free(leaf)]
            assert page in leaves
            assert self.model.used[page] == min(self.model.used[leaf] for leaf in leaves)
            del self.model.known[page]
        self.tree.check()

    def check(self) -> None:
        self.tree.check()
        assert {node.page for node in self.tree} == set(self.model.known)


tokens_of_two = st.lists(st.integers(0, 1), min_size=0, max_size=14).map(tuple)
rounds = st.lists(
    st.one_of(
        st.tuples(st.just("match"), tokens_of_two, st.booleans()),
        st.tuples(st.just("insert"), tokens_of_two),
        st.tuples(st.just("evict"), st.integers(1, 4), st.sets(st.integers(1, 60), max_size=6)),
    ),
    max_size=40,
)


@given(page_size=st.integers(1, 5), rounds=rounds)
def test_a_tree_knows_what_its_model_knows(page_size, rounds):
    pair = Pair(page_size)
    for name, *arguments in rounds:
        getattr(pair, name)(*arguments)
        pair.check()


def drive(count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count // 100):
        pair = Pair(rng.randint(1, 4))
        for _ in range(100):
            tokens = tuple(rng.randint(0, 1) for _ in range(rng.randint(0, 12)))
            kind = rng.random()
            if kind < 0.4:
                pair.match(tokens, rng.random() < 0.5)
            elif kind < 0.8:
                pair.insert(tokens)
            else:
                pair.evict(rng.randint(1, 3), set(rng.sample(range(1, 200), 20)))
            pair.check()


def test_random_rounds():
    drive(2_000, seed=0)


@pytest.mark.slow
def test_many_random_rounds():
    drive(100_000, seed=1)


def test_a_match_may_end_inside_a_page_and_leaves_the_last_token():
    tree = RadixTree(4)
    tree.insert([1, 2, 3, 4, 5, 6], [7, 8])
    assert (tree.match([1, 2, 3, 4, 5, 6]).length, tree.match([1, 2, 3, 4, 5, 6]).pages) == (5, [7, 8])
    assert (tree.match([1, 2, 9, 9]).length, tree.match([1, 2, 9, 9]).pages) == (2, [7])
    assert tree.match([1]).length == tree.match([]).length == tree.match([9, 1]).length == 0


def test_a_longer_tail_takes_the_place_of_a_shorter_one():
    tree = RadixTree(4)
    tree.insert([1, 2], [5])
    out = tree.insert([1, 2, 3], [6])
    assert (out.pages, out.taken, out.dropped) == ([6], [6], [5])
    out = tree.insert([1, 2], [7])
    assert (out.taken, out.dropped) == ([], [])
    tree.check()


def test_known_pages_stand_for_those_that_repeat_them():
    tree = RadixTree(2)
    tree.insert([1, 2, 3, 4], [5, 6])
    out = tree.insert([1, 2, 3, 4, 7, 8], [10, 11, 12])
    assert (out.pages, out.taken) == ([5, 6, 12], [12])


def test_nothing_above_a_held_page_is_evicted():
    tree = RadixTree(2)
    tree.insert([1, 2, 3, 4], [5, 6])
    assert tree.evict(9, lambda page: page != 6) == []
    assert pages_of(tree.evict(9, lambda page: True)) == [6, 5]
    assert (tree.nodes, tree.tokens) == (0, 0)


def test_a_wrong_number_of_pages_is_refused():
    with pytest.raises(ValueError, match="5 tokens lie on 3 pages, 2 were given"):
        RadixTree(2).insert([1, 2, 3, 4, 5], [1, 2])


def test_clear_gives_every_page_back():
    tree = RadixTree(2)
    tree.insert([1, 2, 3], [4, 5])
    assert sorted(pages_of(tree.clear())) == [4, 5]
    assert tree.match([1, 2, 3]).length == 0
    tree.check()
