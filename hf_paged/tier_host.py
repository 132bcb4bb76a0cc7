"""Evicted pages in host memory: for a model on a device, whose own memory is scarcer."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch

from hf_paged.store import KVStore
from hf_paged.tiers import Tier, page_row, row_elements

logger = logging.getLogger("hf_paged")

CHUNK_BYTES = 64 << 20  # memory is taken from the system in pieces of this size
CHUNK_PAGES = 4096  # or of so many pages, if they are small


class _Node:
    """A page of a path. `slot`: where its KV is; None: not here, but pages behind it are."""

    __slots__ = ("tokens", "parent", "children", "slot")

    def __init__(self, tokens: tuple[int, ...], parent: _Node | None) -> None:
        self.tokens, self.parent, self.slot = tokens, parent, None
        self.children: dict[tuple[int, ...], _Node] = {}


class HostTier(Tier):
    """Pages in host memory, pinned if the store is on a CUDA device. See `Tier`.

    Memory is taken when it is first needed and kept. The least recently used pages are given up. Tokens are compared,
    never hashes only. Copies run on the current stream, which must be that of everything that touches the store.
    """

    def __init__(self, store: KVStore, max_bytes: int) -> None:
        super().__init__(store, max_bytes)
        self._pinned = store.keys[0].device.type == "cuda"
        self._row_bytes = store.bytes_per_page
        self._rows_of_slots: list[torch.Tensor] = []
        self._taken, self._grows = 0, True
        self._reset()

    def put(self, tokens: Sequence[int], salt: str | None, page: int) -> bool:
        self._require_path(tokens)
        nodes = self._path(tokens, salt, len(tokens) // self.page_size)
        if len(nodes) * self.page_size == len(tokens) and nodes[-1].slot is not None:
            self._touch(nodes[-1])
            return True
        if not self._make_room():
            return False
        # An interrupt anywhere below loses a slot at worst; none ever serves two pages.
        self._rows_of_slots[self._free[-1]].copy_(page_row(self.store, page), non_blocking=True)
        slot, node = self._free.pop(), self._add(tokens, salt)
        node.slot = slot
        self._order[node] = None
        self.puts += 1
        self._recount()
        return True

    def clear(self, identity: str | None = None) -> None:
        self._reset()

    def _locate(self, tokens: Sequence[int], salt: str | None, first: int, end: int) -> list[_Node]:
        found = self._path(tokens, salt, end)[first:]
        missing = next((i for i, node in enumerate(found) if node.slot is None), len(found))
        return found[:missing]

    def _load(self, found: _Node) -> torch.Tensor | None:
        return None if found.slot is None else self._rows_of_slots[found.slot]

    def _touch(self, found: _Node) -> None:
        self._order[found] = None  # an interrupted `put` may have left it out
        self._order.move_to_end(found)

    # -- memory

    def _make_room(self) -> bool:
        """Whether there is a free slot, after growing or giving a page up."""
        if not self._free and self._grows:
            self._grow()
        if not self._free and self._order:
            node, _ = self._order.popitem(last=False)
            slot, node.slot = node.slot, None
            self._prune(node)
            self._free.append(slot)
            self.evictions += 1
            self._recount()
        return bool(self._free)

    def _grow(self) -> None:
        size = self._row_bytes
        budget = min(self.max_bytes - self._taken, max(CHUNK_BYTES, _power_of_two(size)))
        if self._pinned and budget > 0:
            budget = 1 << (budget.bit_length() - 1)  # pinned memory comes in powers of two
        count = min(budget // size, CHUNK_PAGES)
        if count < 1:
            self._grows = False
            return
        try:
            with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
                chunk = torch.empty(
                    (count, row_elements(self.store)), dtype=self.store.dtype, pin_memory=self._pinned, device="cpu"
                )
        except (RuntimeError, MemoryError) as error:
            self._grows = False
            logger.warning("no more host memory for evicted pages than %d bytes: %s", self._taken, error)
            return
        self._taken += _power_of_two(count * size) if self._pinned else count * size
        begin = len(self._rows_of_slots)
        self._rows_of_slots.extend(chunk)
        self._free.extend(reversed(range(begin, begin + count)))

    def _recount(self) -> None:
        self.pages = len(self._order)
        self.bytes = self.pages * self._row_bytes

    # -- the trie

    def _reset(self) -> None:
        self._roots: dict[str | None, _Node] = {}
        self._order: OrderedDict[_Node, None] = OrderedDict()  # nodes with a slot, least recently used first
        self._free = list(reversed(range(len(self._rows_of_slots))))
        self._recount()

    def _path(self, tokens: Sequence[int], salt: str | None, end: int) -> list[_Node]:
        """Nodes of the first pages of `tokens`, `end` at most, as far as they are known."""
        nodes: list[_Node] = []
        node, size = self._roots.get(salt), self.page_size
        for index in range(end if node is not None else 0):
            node = node.children.get(tuple(tokens[index * size : (index + 1) * size]))
            if node is None:
                break
            nodes.append(node)
        return nodes

    def _add(self, tokens: Sequence[int], salt: str | None) -> _Node:
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = _Node((salt,), None)
        for begin in range(0, len(tokens), self.page_size):
            part = tuple(tokens[begin : begin + self.page_size])
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = _Node(part, node)
            node = child
        return node

    def _prune(self, node: _Node) -> None:
        """Remove a node without KV, and its ancestors, as far as nothing hangs below."""
        while node.slot is None and not node.children:
            if node.parent is None:
                del self._roots[node.tokens[0]]
                return
            del node.parent.children[node.tokens]
            node = node.parent

    def check(self) -> None:
        """Verify the laws of the trie and of the slots.

        Raises:
            AssertionError: one does not hold.
        """
        nodes, stack = [], list(self._roots.values())
        while stack:
            node = stack.pop()
            assert node.children or node.slot is not None, "a node without KV has nothing below"
            assert all(child.parent is node and child.tokens == key for key, child in node.children.items())
            nodes.append(node)
            stack.extend(node.children.values())
        held = [node for node in nodes if node.slot is not None]
        assert set(held) == set(self._order), "pages in the trie and in the order of use differ"
        slots = sorted([*(node.slot for node in held), *self._free])
        assert slots == list(range(len(self._rows_of_slots))), "a slot is lost or serves twice"
        assert self.pages == len(held) and self.bytes <= self.max_bytes


def _power_of_two(size: int) -> int:
    """The least that is not below `size`."""
    return 1 << (size - 1).bit_length()
