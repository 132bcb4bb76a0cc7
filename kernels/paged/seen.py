"""What each query of a step sees: lengths, windows and trees of drafts brought to one form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_paged.kernels.rows import ALL, PagedRows, TreeMask


@dataclass(frozen=True, eq=False)
class Seen:
    """Which slots of which line of a page table each query sees. All arrays are int64 `[queries]`.

    Attributes:
        line_of, context: query `i` sees the first `context[i]` slots of line `line_of[i]`,
        begin: but those before `begin[i]` (None: from the first),
        visible, base: and, where draft tokens branch, what `TreeMask` says.
    """

    line_of: np.ndarray
    context: np.ndarray
    begin: np.ndarray | None = None
    visible: np.ndarray | None = None
    base: np.ndarray | None = None

    def first(self, n: int) -> Seen:
        """The same for the first `n` queries."""
        parts = (self.line_of, self.context, self.begin, self.visible, self.base)
        return Seen(*(None if part is None else part[:n] for part in parts))


def build_seen(rows: PagedRows, window: int | None) -> Seen:
    """What each query of the step sees."""
    if rows.tree is None and window is None and rows.num_decodes == len(rows.query_lens):  # most steps are such
        return Seen(np.arange(rows.num_decodes), rows.context_lens)
    line_of, context = _places(rows)
    tree = rows.tree
    if tree is None:
        begin = None if window is None else np.maximum(context - window, 0)
        return Seen(line_of, context, begin)
    visible, begin = tree.visible, None
    if window is not None:
        plain = visible == ALL
        begin = np.maximum(np.where(plain, context, tree.positions + 1) - window, 0)
        begin = np.where(plain, begin, np.minimum(begin, tree.base))
        visible = within(tree, window)
    return Seen(line_of, context, begin, visible, tree.base)


def _places(rows: PagedRows) -> tuple[np.ndarray, np.ndarray]:
    """Of each query its line of the page table, and the slots up to its own."""
    if len(rows.query_lens) == 1:  # of a request alone, for which numpy's calls would take longer
        count, end = int(rows.query_lens[0]), int(rows.context_lens[0])
        return np.zeros(count, np.int64), np.arange(end - count + 1, end + 1)
    line_of = np.repeat(np.arange(len(rows.query_lens)), rows.query_lens)
    ends = np.cumsum(rows.query_lens)
    return line_of, (rows.context_lens - ends)[line_of] + np.arange(1, len(line_of) + 1)


def within(tree: TreeMask, window: int) -> np.ndarray:
    """`tree.visible` without what lies before a window. A bit's position is its depth: how many bits its query sees."""
    visible = tree.visible.copy()
    for i in np.flatnonzero(visible != ALL).tolist():
        bits, excess = int(visible[i]), int(tree.positions[i] - tree.base[i]) + 1 - window
        for _ in range(max(excess, 0)):  # of a path the lowest bits come first
            bits &= bits - 1
        visible[i] = bits
    return visible
