"""The whole prefix cache to a file, and back: a header computed once serves the next process."""

from __future__ import annotations

import os
from pathlib import Path

from hf_paged.memory import Memory
from hf_paged.prefix_files import LoadedPrefixes, PrefixPage, load, save
from hf_paged.radix import Node
from hf_paged.store import KVStore


def save_prefixes(memory: Memory, store: KVStore, path: str | os.PathLike, identity: str) -> Path:
    """Write all that the prefix cache holds to a file; see `hf_paged.prefix_files.save`."""
    index: dict[Node, int] = {}
    entries = []
    for node in memory.prefixes.tree:
        index[node] = len(entries)
        parent = index.get(node.parent, -1)
        entries.append(PrefixPage(parent, node.tokens, node.salt if parent < 0 else entries[parent].salt, node.page))
    return save(path, entries, store, identity)


def load_prefixes(memory: Memory, store: KVStore, path: str | os.PathLike, identity: str) -> int:
    """Add what a file holds to the prefix cache, as far as pages are free.

    Returns:
        tokens that were added.
    Raises:
        PrefixFileRefused: the file is not valid here; nothing was changed.
    """
    loaded = load(path, store, identity)
    with memory.borrowed() as pages:
        chosen = _unknown(memory, loaded)[: memory.pool.free]
        pages += memory.pool.take(len(chosen))
        loaded.copy_to(chosen, pages)
        return memory.prefixes.adopt(loaded.entries, dict(zip(chosen, pages, strict=True)))


def _unknown(memory: Memory, loaded: LoadedPrefixes) -> list[int]:
    """Entries whose tokens the prefix cache does not have, parents first."""
    tree = memory.prefixes.tree
    nodes: list[Node | None] = []
    unknown = []
    for number, entry in enumerate(loaded.entries):
        parent = tree.root(entry.salt) if entry.parent < 0 else nodes[entry.parent]
        nodes.append(parent and tree.child(parent, entry.tokens))
        if nodes[-1] is None:
            unknown.append(number)
    return unknown
