"""Which slots many queries of a step see together: attention over these is computed once for all of them.

As Juravsky et al., "Hydragen", 2024, Ye et al., "ChunkAttention", ACL 2024, and the cascade inference of FlashInfer: a
query's attention over some of its slots is a part, `(weighted values, largest score, sum of exponentials)`, and parts
are merged by log-sum-exp. Rows that share pages have the same page at the same index of their page tables; sharing
nests, as in a tree. A prompt's chunk is a group by itself: all its queries see what lies before it, and each of them
the chunk as far as its own place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_paged.kernels.rows import ALL, PagedRows

# Below these a part costs more to merge than it saves (measured on two cores, 6 heads over 2, of 64). Heads of a query
# that share keys are lines of one product, which wants some lines: with such heads fewer queries are enough.
LEAST_SLOTS, LEAST_QUERIES, LEAST_LINES = 192, 8, 10
LEAST_CAUSAL = 64  # slots that queries of one row see: nothing is merged over rows there


@dataclass(frozen=True, eq=False)
class Groups:
    """Segments of shared slots, and what is left to each query. All arrays are int64.

    Attributes:
        own: `[queries]`, first slot that is not in a segment.
        segments: `[n, 6]`: line of the page table, first slot, last slot + 1, first member, members, and 1 where each
            member sees the slots up to its own only, else 0.
        members: `[m]`, queries, segment by segment.
        part_start: `[queries + 1]`, where the places of query `i` among the members begin in `parts`.
        parts: `[m]`, places among the members, query by query.
    """

    own: np.ndarray
    segments: np.ndarray
    members: np.ndarray
    part_start: np.ndarray
    parts: np.ndarray


def least_together(heads: int) -> int:
    """Queries that are a group, where so many heads of one share keys."""
    return min(LEAST_QUERIES, -(-LEAST_LINES // heads))


def build_groups(rows: PagedRows, heads: int = 1) -> Groups | None:
    """The groups of a step, or None where nothing is shared.

    Args:
        heads: of a query that share keys.
    """
    least = least_together(heads)
    if len(rows.query_lens) == 1:
        return _alone(rows) if len(rows.slots) >= least else None
    first = rows.page_table[:, 0].tolist()
    # Prompts' chunks that are groups by themselves.
    chunks = (rows.query_lens >= least) & (rows.context_lens >= LEAST_CAUSAL)
    if not chunks.any() and len(set(first)) == len(first):
        return None
    found = _Finder(rows, least)
    by_page: dict[int, list[int]] = {}
    for row, page in enumerate(first):
        by_page.setdefault(page, []).append(row)
    for members in by_page.values():
        if len(members) > 1 or chunks[members[0]]:
            found.split(members, 0, 0)
    return found.groups()


def _alone(rows: PagedRows) -> Groups | None:
    """The same as the finder below finds for one row, in a few of its calls: a step's drafts for one request."""
    count, context = len(rows.slots), int(rows.context_lens[0])
    causal = rows.tree is None or rows.tree.visible[0] == ALL
    end = context if causal else min(context - count, int(rows.tree.base[0]))
    if end < LEAST_CAUSAL:
        return None
    queries = np.arange(count + 1)
    return Groups(
        own=queries[1:] + (context - count) if causal else np.full(count, end),
        segments=np.array([[0, 0, end, 0, count, causal]], np.int64),
        members=queries[:-1],
        part_start=queries,
        parts=queries[:-1],
    )


class _Finder:
    """Walks down the tree that the page tables form."""

    def __init__(self, rows: PagedRows, least: int) -> None:
        self.least = least  # queries of a segment
        self.size, self.table, self.lens = rows.page_size, rows.page_table, rows.query_lens
        self.before = rows.context_lens - rows.query_lens  # slots that all queries of a row see
        ends = rows.query_lens.cumsum()
        self.start = ends - rows.query_lens
        self.several = (rows.query_lens >= least).tolist()
        self.causal = self.several
        if rows.tree is not None:
            first = np.minimum(self.start, len(rows.tree.base) - 1)  # behind the last token rows may have none
            self.before = np.minimum(self.before, rows.tree.base[first])
            branches = rows.tree.visible[first] != ALL
            self.causal = [several and not tree for several, tree in zip(self.several, branches.tolist(), strict=True)]
        self.own = np.zeros(int(ends[-1]), np.int64)
        self.segments: list[tuple[int, int, int, int, int, int]] = []
        self.members: list[np.ndarray] = []
        self.placed = 0

    def split(self, rows: list[int], page: int, begin: int) -> None:
        """`rows` share their first `page` pages, of which slots from `begin` on are in no segment yet."""
        if len(rows) == 1:
            self._single(rows[0], begin)
            return
        at = np.array(rows)
        full = self.before[at] // self.size  # pages that all queries of a row see whole
        least = int(full.min())
        part = self.table[at, page:least]
        unlike = (part != part[0]).any(0).tolist()
        shared = page + (unlike.index(True) if True in unlike else len(unlike))
        begin = self._segment(rows, begin, shared * self.size, LEAST_SLOTS)
        branches: dict[int, list[int]] = {}
        for row, pages, next_page in zip(rows, full.tolist(), self._pages(at, shared), strict=True):
            branches.setdefault(next_page if pages > shared else -row, []).append(row)
        for branch in branches.values():
            if len(branch) > 1 or self.several[branch[0]]:
                self.split(branch, shared, begin)

    def _pages(self, rows: np.ndarray, index: int) -> list[int]:
        if index >= self.table.shape[1]:
            return [0] * len(rows)
        return self.table[rows, index].tolist()

    def _single(self, row: int, begin: int) -> None:
        """What the queries of one row see together: of a chunk all there is, of a tree what lies before it."""
        count, before = int(self.lens[row]), int(self.before[row])
        if not self.causal[row] or before + count - begin < LEAST_CAUSAL:
            self._segment([row], begin, before, LEAST_CAUSAL)
            return
        queries = np.arange(count) + self.start[row]
        self._note(row, begin, before + count, queries, 1)
        self.own[queries] = before + np.arange(1, count + 1)

    def _segment(self, rows: list[int], begin: int, end: int, least: int) -> int:
        """Slots `begin` to `end` for all queries of `rows`, if there are `least`. Returns the first in no segment."""
        first, lens = self.start[rows], self.lens[rows]
        if end - begin < least or lens.sum() < self.least:
            return begin
        ends = lens.cumsum()
        # Of each row its first query and those after it.
        queries = (first - ends + lens).repeat(lens) + np.arange(int(ends[-1]))
        self.own[queries] = end
        self._note(rows[0], begin, end, queries, 0)
        return end

    def _note(self, line: int, begin: int, end: int, queries: np.ndarray, causal: int) -> None:
        self.segments.append((line, begin, end, self.placed, len(queries), causal))
        self.members.append(queries)
        self.placed += len(queries)

    def groups(self) -> Groups | None:
        if not self.segments:
            return None
        members = np.concatenate(self.members)
        part_start = np.zeros(len(self.own) + 1, np.int64)
        np.bincount(members, minlength=len(self.own)).cumsum(out=part_start[1:])
        return Groups(
            own=self.own,
            segments=np.array(self.segments, np.int64),
            members=members,
            part_start=part_start,
            parts=members.argsort(kind="stable"),
        )
