"""What prefix sharing is made of, each by itself: the tree's own speed, and attention over a prefix that rows share."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from hf_paged.kernels import PagedRows, paged_attention
from hf_paged.radix import RadixTree


def random_sequences(count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """`count` sequences of `tokens` tokens; half of them begin as an earlier one does."""
    rng = Random(seed)
    out: list[list[int]] = []
    for i in range(count):
        begin = rng.choice(out)[: rng.randrange(tokens)] if i % 2 else []
        out.append(begin + [rng.randrange(32_000) for _ in range(tokens - len(begin))])
    return out


def tree_speed(count: int = 100_000, tokens: int = 20, page_size: int = 16) -> dict[str, Any]:
    """Microseconds a token to insert and to match sequences, and a page to evict; bytes a node."""
    sequences = random_sequences(count, tokens)
    pages = -(-tokens // page_size)
    held = [list(range(i * pages + 1, (i + 1) * pages + 1)) for i in range(count)]
    tree, total = RadixTree(page_size), count * tokens

    def timed(work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e6

    insert = timed(lambda: [tree.insert(s, p) for s, p in zip(sequences, held, strict=True)])
    match = timed(lambda: [tree.match(s) for s in sequences])
    nodes = tree.nodes
    evict = timed(lambda: tree.evict(nodes // 2, lambda page: True))
    return {
        "sequences": count,
        "tokens": total,
        "page_size": page_size,
        "nodes": nodes,
        "insert_us_per_token": insert / total,
        "match_us_per_token": match / total,
        "evict_us_per_page": evict / (nodes // 2),
        "bytes_per_node": _bytes_per_node(sequences[: count // 10], page_size),
    }


def _bytes_per_node(sequences: list[list[int]], page_size: int) -> float:
    tree = RadixTree(page_size)
    held = [[0] * -(-len(s) // page_size) for s in sequences]
    tracemalloc.start()
    for sequence, pages in zip(sequences, held, strict=True):
        tree.insert(sequence, pages)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / tree.nodes


def shared_attention(
    rows: int = 32,
    shared: int = 1000,
    own: int = 100,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 64,
    layers: int = 8,
    page_size: int = 16,
    repeats: int = 21,
) -> dict[str, Any]:
    """Attention of one decode step over rows that share a prefix: grouped over ungrouped, median of runs in turns."""
    table, context = _tables(rows, shared, own, page_size)
    shape = (int(table.max()) + 1, kv_heads, page_size, dim)
    kv = [(torch.randn(shape), torch.randn(shape)) for _ in range(layers)]
    query = torch.randn(rows, heads, dim)
    lens = np.ones(rows, np.int64)

    def step(grouped: bool) -> tuple[float, torch.Tensor]:
        plan = PagedRows(page_size, rows, lens, context, table, torch.zeros(rows, dtype=torch.long), grouped=grouped)
        begin = time.perf_counter()
        for keys, values in kv:
            out = paged_attention(query, keys, values, plan, scale=dim**-0.5)
        return time.perf_counter() - begin, out

    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for grouped, taken in times.items():
            taken.append(step(grouped)[0])
    worst = float((step(True)[1] - step(False)[1]).abs().max())
    ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
    milliseconds = {
        name: statistics.median(times[key]) * 1e3 for name, key in (("grouped", True), ("ungrouped", False))
    }
    return {"rows": rows, "shared": shared, "own": own, "ratio": ratio, "ms": milliseconds, "largest_difference": worst}


def _tables(rows: int, shared: int, own: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Page table and lengths of rows that share whole pages of their first `shared` tokens, in no order of memory."""
    first = shared // page_size
    each = -(-(shared + own) // page_size) - first
    pages = np.random.default_rng(0).permutation(np.arange(1, first + rows * each + 1))
    table = np.concatenate([np.tile(pages[:first], (rows, 1)), pages[first:].reshape(rows, each)], axis=1)
    return table, np.full(rows, shared + own, np.int64)
