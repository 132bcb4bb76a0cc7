"""A sequence: tokens and the pages that hold their keys and values."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from hf_paged.radix import Node


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens of one row and its page table. Only `Memory` writes `pages` and `computed`.

    Attributes:
        tokens: token ids, prompt first. Its owner appends to it.
        pages: page of every `page_size` tokens, in order.
        computed: tokens, from the first, whose KV is stored.
        open: False once `Memory.close` has taken its pages.
        shared: whether its pages may be shared through the radix tree, below the root of `salt`.
        node: the last node of its full pages in the tree; None: it takes no part.
        found: pages that it found there, from the first, when it was opened.
    """

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    open: bool = True
    shared: bool = False
    salt: Hashable = None
    node: Node | None = field(default=None, repr=False)
    found: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed

    def slot(self, place: int, page_size: int) -> int:
        """Where KV of the token at `place` lies among all slots of the pool."""
        return self.pages[place // page_size] * page_size + place % page_size
