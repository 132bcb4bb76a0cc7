"""A sequence: tokens and the pages that hold their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens of one row and its page table. Only `Memory` writes `pages` and `computed`.

    Attributes:
        tokens: token ids, prompt first. Its owner appends to it.
        pages: page of every `page_size` tokens, in order.
        computed: tokens, from the first, whose KV is stored.
        open: False once `Memory.close` has taken its pages.
    """

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    open: bool = True

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed
