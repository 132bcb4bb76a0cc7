"""A trace of block ids in order of arrival, without a model: hit rates of evictions over the size of the pool."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.radix import RadixTree

SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)
NEVER = 1 << 60


def run_trace(requests: Sequence[Sequence[int]], shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Hit rates over all blocks, of pools of some sizes.

    Args:
        requests: ids of blocks in order; an equal id stands for an equal prefix up to and including that block.
        shares: sizes of the pool, as shares of the distinct blocks.

    Returns:
        `shares`, `pages` and for each of them the hit rates of `lru` (least recently used leaf), `ours` (`RadixTree`)
        and `optimum` (the leaf whose next use is farthest, which knows the future: Belady, 1966); and that of an
        `unlimited` pool.
    """
    distinct = len({block for request in requests for block in request})
    pages = [max(int(share * distinct), 1) for share in shares]
    return {
        "requests": len(requests),
        "blocks": sum(map(len, requests)),
        "distinct": distinct,
        "shares": list(shares),
        "pages": pages,
        "lru": [tree_hits(requests, n, learn=False) for n in pages],
        "ours": [tree_hits(requests, n) for n in pages],
        "optimum": [optimal_hits(requests, n) for n in pages],
        "unlimited": optimal_hits(requests, distinct),
    }


def tree_hits(requests: Sequence[Sequence[int]], pages: int, learn: bool = True) -> float:
    """Hit rate of the engine's tree with pages of one block; `learn=False`: least recently used first."""
    tree, hits = RadixTree(1, learn), 0
    for request in requests:
        hits += tree.match([*request, -1]).length
        tree.insert(request, [0] * len(request))
        if tree.nodes > pages:
            tree.evict(tree.nodes - pages, lambda page: True)
    return hits / sum(map(len, requests))


def optimal_hits(requests: Sequence[Sequence[int]], pages: int) -> float:
    """Hit rate of the eviction that knows when each block is used next."""
    parent: dict[int | None, int | None] = {None: None}
    children: dict[int | None, int] = defaultdict(int)
    held: dict[int, int] = {}  # block → when it is used next
    queue: list[tuple[int, int]] = []
    hits = 0
    for request, following in zip(requests, _next_uses(requests), strict=True):
        before, missed = None, False
        for block, use in zip(request, following, strict=True):
            if block not in held:
                missed = True
                parent[block] = before
                children[before] += 1
            hits += not missed
            held[block] = use
            before = block
        if before is not None and not children[before]:
            heappush(queue, (-held[before], before))
        while len(held) > pages:
            use, block = heappop(queue)
            if held.get(block) != -use or children[block]:
                continue  # out of date
            del held[block]
            above = parent[block]
            children[above] -= 1
            if above is not None and not children[above]:
                heappush(queue, (-held[above], above))
    return hits / sum(map(len, requests))


def _next_uses(requests: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each block of each request the number of the next request that uses it."""
    last: dict[int, int] = {}
    out = []
    for number in range(len(requests) - 1, -1, -1):
        out.append([last.get(block, NEVER) for block in requests[number]])
        last.update(dict.fromkeys(requests[number], number))
    return out[::-1]


def plot_curves(trace: dict[str, Any], path: str) -> None:
    """A picture of hit rate over pool size, in the format that the file's name says.

    Raises:
        BadInput: there is no matplotlib, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput(f"--plot needs matplotlib ({error}): pip install 'hf_paged[plot]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("optimum", "optimum (Belady)"), ("ours", "hf_paged"), ("lru", "LRU")):
        axes.plot([100 * s for s in trace["shares"]], [100 * h for h in trace[name]], marker="o", ms=3, label=label)
    axes.axhline(100 * trace["unlimited"], color="grey", lw=0.8, ls="--", label="unlimited")
    axes.set(xscale="log", xlabel="pool, % of the working set", ylabel="blocks hit, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise BadInput(f"--plot {path}: cannot be written: {error}") from error
