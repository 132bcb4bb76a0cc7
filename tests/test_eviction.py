"""What is given up first: it learns what returns, and is never much worse than least recently used."""

import random

import pytest

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.bench.prefix_trace import optimal_hits, plot_curves, run_trace, tree_hits
from hf_paged.radix import RadixTree


class Trace:
    """Requests made of blocks; an id stands for a whole prefix."""

    def __init__(self, seed):
        self.rng, self.next, self.requests = random.Random(seed), 0, []

    def fresh(self, count):
        self.next += count
        return list(range(self.next - count, self.next))


def hot_prefixes_and_scans(seed=0):
    """Ten headers that come back now and then, and bursts of long prompts that never do."""
    trace = Trace(seed)
    hot = [trace.fresh(10) for _ in range(10)]
    for burst in range(60):
        for _ in range(20):
            trace.requests.append(trace.rng.choice(hot) + trace.fresh(1))
        if burst > 10:
            trace.requests += [trace.fresh(12) for _ in range(14)]
    return trace.requests


def chats(seed=0, sessions=500, again=0.6):
    """Conversations of several turns, of which many end after the first."""
    trace = Trace(seed)
    system, events = trace.fresh(1), []
    for start in range(sessions):
        text, time = [*system, *trace.fresh(trace.rng.randrange(1, 12))], start * 6.0
        while True:
            events.append((time, [*text, *trace.fresh(1)]))
            if trace.rng.random() > (again if len(text) > 8 else again / 2):
                break
            text = [*text, *trace.fresh(trace.rng.randrange(1, 6))]
            time += trace.rng.lognormvariate(5, 1)
    return [request for _, request in sorted(events)]


def loops(seed=0):
    """A list that is larger than most pools, again and again."""
    trace = Trace(seed)
    texts = [trace.fresh(5) for _ in range(200)]
    return texts * 8


@pytest.mark.parametrize("make", [hot_prefixes_and_scans, chats, loops])
def test_never_much_worse_than_least_recently_used(make):
    requests = make()
    distinct = len({block for request in requests for block in request})
    for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
        pages = int(share * distinct)
        lru, ours, best = tree_hits(requests, pages, False), tree_hits(requests, pages), optimal_hits(requests, pages)
        assert lru - 0.002 <= ours <= best + 1e-9


def test_a_scan_does_not_flush_hot_prefixes():
    requests = hot_prefixes_and_scans()
    lru, ours = tree_hits(requests, 200, False), tree_hits(requests, 200)
    assert ours > lru + 0.03, (lru, ours)


def test_the_optimum_is_found_by_trying_everything():
    rng = random.Random(3)

    def best(requests, pages, held=frozenset(), at=0):
        """Most hits, over all choices of what to give up. A block's parent is the one before it in its request."""
        if at == len(requests):
            return 0
        hits = next((i for i, b in enumerate(requests[at]) if b not in held), len(requests[at]))
        states = {held | set(requests[at])}
        while any(len(state) > pages for state in states):
            states = {
                state - {b} if len(state) > pages else state
                for state in states
                for b in (leaves(state) if len(state) > pages else [None])
            }
        return hits + max(best(requests, pages, state, at + 1) for state in states)

    def leaves(state):
        return [b for b in state if not any(o != b and o[: len(b)] == b for o in state)]

    for _ in range(25):
        texts = [tuple(rng.randrange(2) for _ in range(rng.randrange(1, 4))) for _ in range(5)]
        requests = [[text[: i + 1] for i in range(len(text))] for text in texts]
        total = sum(map(len, requests))
        assert round(optimal_hits(requests, 3) * total) == best(requests, 3)


@pytest.mark.parametrize("learn", [True, False])
def test_nothing_that_is_held_is_given_up(learn):
    rng = random.Random(1)
    for _ in range(40):
        tree, page, held = RadixTree(2, learn), 0, set()
        for _ in range(150):
            tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
            pages = list(range(page + 1, page + 2 + len(tokens) // 2))[: -(-len(tokens) // 2)]
            page += len(pages)
            taken = tree.insert(tokens, pages).taken
            held = {p for p in held if rng.random() < 0.9} | {p for p in taken if rng.random() < 0.3}
            gone = {node.page for node in tree.evict(rng.randrange(4), lambda p, held=held: p not in held)}
            assert not gone & held
            tree.check()
        tree.evict(1 << 30, lambda p: True)
        assert tree.nodes == 0


def test_a_trace_and_its_picture(tmp_path):
    trace = run_trace(chats(sessions=60), (0.1, 1.0))
    assert trace["lru"][1] == trace["ours"][1] == trace["optimum"][1] == trace["unlimited"]
    pytest.importorskip("matplotlib")
    plot_curves(trace, str(tmp_path / "curves.svg"))
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    with pytest.raises(BadInput, match="cannot be written"):
        plot_curves(trace, str(tmp_path / "none" / "curves.svg"))
