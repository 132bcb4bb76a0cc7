"""Drafts of a model: its KV lies in pages of its own store under the page ids of the target's."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from math import inf
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from hf_paged.kernels.native_drafts import NativeDrafts
from hf_paged.memory import PageCopy
from hf_paged.plan import PlanRow, Span, StepPlan
from hf_paged.sequence import Sequence
from hf_paged.speculation.choose import Chosen, choose
from hf_paged.speculation.drafter import KINDS, Drafter, kind_of, likelihood
from hf_paged.speculation.few import FewDrafts
from hf_paged.speculation.guide import Guide
from hf_paged.speculation.proposal import Proposal, Verdict, tree_places
from hf_paged.speculation.tree import Tree
from hf_paged.store import KVStore

OFTEN = 16  # chains between two looks at what drafts are worth


class DraftModel(Drafter):
    """Drafts by a causal model with the target's vocabulary, or by the target's own first layers.

    A batch of drafts is one forward a depth. What was drafted and taken is known to the draft model already; what was
    not is computed anew with the row's next tokens, in the same forward. A row that is too long for the draft model
    gets no drafts.

    Args:
        num_pages, page_size: of the target's pool.
        store: None: the target's own forward stores KV (layer skip).
        sizes: ids that target and draft model take, where these differ: of a vocabulary that is padded.
        settings: see `Drafter`.
    """

    def __init__(
        self,
        forward: Callable[[StepPlan], torch.Tensor],
        store: KVStore | None,
        num_pages: int,
        page_size: int,
        sizes: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(forward, store, page_size, **settings)
        self.sizes = sizes
        self._trees: dict[Sequence, Tree] = {}  # of the latest step
        self._op: NativeDrafts | None = None
        self._odds, self._asked = np.zeros(KINDS, np.float32), 0
        self._filled = np.zeros(num_pages + 1, np.int32)  # slots of each page that hold KV of the tokens there

    # -- pages

    def forget(self) -> None:
        """No KV is known any more."""
        self._filled[:] = 0

    def taken(self, pages: Rows[int]) -> None:
        """These pages begin anew."""
        for page in pages:  # one or two: a step's rows take theirs one by one
            self._filled[page] = 0

    def copied(self, copies: list[PageCopy]) -> None:
        """Pages were copied."""
        if self.store is not None and copies:
            self.store.copy(copies)
            for copy in copies:
                self._filled[copy.target] = min(self._filled[copy.source], copy.valid)

    def known(self, planned: PlanRow) -> int:
        """Tokens of the row, from the first, whose KV is there."""
        sequence, size = planned.sequence, self.page_size
        if self.store is None:
            return sequence.computed
        filled = self._filled[sequence.pages[: -(-sequence.computed // size)]]
        short = np.flatnonzero(filled < size)
        known = len(filled) * size if not len(short) else int(short[0]) * size + int(filled[short[0]])
        return min(known, sequence.computed)

    def mark(self, planned: PlanRow, begin: int, known: int, pages: Rows[int] | None = None) -> None:
        """KV of a row's tokens `begin` to `known` is there now, and of none behind.

        Args:
            pages: of the row when it was stored; since, one that filled up may have been given up for another's.
        """
        size, pages = self.page_size, planned.sequence.pages if pages is None else pages
        for index in range(begin // size, min(-(-(known + 1) // size), len(pages))):
            self._filled[pages[index]] = min(max(known - index * size, 0), size)

    # -- drafts

    def _draft(
        self, rows: Rows[PlanRow], deepest: Rows[int], guide: Guide, reserve: Callable[[PlanRow, int], bool]
    ) -> list[Proposal | None]:
        depths = [min(depth, self._deepest(planned)) for planned, depth in zip(rows, deepest, strict=True)]
        trees = [Tree(planned, depth) for planned, depth in zip(rows, depths, strict=True)]
        self._trees = {tree.planned.sequence: tree for tree in trees}
        self._grow([tree for tree in trees if tree.deepest > 0], guide, reserve)
        for tree in trees:
            tree.pages = list(tree.planned.sequence.pages)
        return [self._proposal(tree) if tree.tokens else None for tree in trees]

    def _deepest(self, planned: PlanRow) -> int:
        """Drafts one behind another that its model can make of a row."""
        sequence = planned.sequence
        if self.sizes is not None and max(sequence.tokens[self.known(planned) :]) >= self.sizes[1]:
            return 0
        return self.longest - sequence.computed

    def _run(self, rows: list[PlanRow]) -> torch.Tensor:
        logits = super()._run(rows)
        if self.sizes is None:
            return logits
        target, own = self.sizes
        return logits[:, :target] if own > target else pad(logits, (0, target - own), value=-inf)

    def _give_up(self, rows: Rows[PlanRow]) -> None:
        super()._give_up(rows)
        if self.store is not None:
            self.store.scrub(sorted({page for planned in rows for page in planned.sequence.pages}))

    def _proposal(self, tree: Tree) -> Proposal:
        parts = (tree.tokens, tree.parents, tree.kinds, tree.odds)
        return Proposal(*map(tuple, parts), self.name)

    def _grow(self, trees: list[Tree], guide: Guide, reserve: Callable[[PlanRow, int], bool]) -> None:
        deepest = max((tree.deepest for tree in trees), default=0)
        if deepest == 0:
            return
        known = [self.known(tree.planned) for tree in trees]
        self.lag = lag = sum(tree.planned.sequence.computed + 1 - at for tree, at in zip(trees, known, strict=True))
        with self._timed(guide):
            # (What is compiled knows one vocabulary.)
            given = self.forward, trees, self.page_size, self.most, self._op
            few = FewDrafts.begin(*given) if self.sizes is None else None
            self._op = few.op if few is not None else None
        alone = len(trees) == 1 and guide.ledger is not None and not guide.threshold
        if few is not None and alone and lag <= few.most and reserve(trees[0].planned, deepest - 1):
            self._grow_chain(trees[0], few, known[0], guide)
            return
        with self._timed(guide, lag):
            if few is not None and lag <= few.most:
                chosen = few.behind_known(known, guide.width)
            else:
                chosen = self._choose(trees, self._catch_up(trees, known), guide.width)
            for tree, begin in zip(trees, known, strict=True):
                self.mark(tree.planned, begin, tree.planned.sequence.computed + 1)
            self._extend(trees, chosen, guide, 1)
        for depth in range(2, deepest + 1):
            growing = [tree for tree in trees if tree.frontier and depth <= tree.deepest]
            growing = [tree for tree in growing if reserve(tree.planned, len(tree.tokens))]
            least = guide.least_before(depth)
            for tree in growing:
                tree.frontier = [node for node in tree.frontier if tree.reach[node] >= least]
            growing = [tree for tree in growing if tree.frontier]
            reaches = [tree.reach[node] for tree in growing for node in tree.frontier]
            if not guide.goes_on(depth, reaches, deepest):
                return
            with self._timed(guide, len(reaches)):
                if few is not None and len(reaches) <= few.most:
                    chosen = few.behind_frontier(growing, depth, guide.width)
                else:
                    chosen = self._choose(growing, self._compute(growing), guide.width)
                self._extend(growing, chosen, guide, depth)

    def _grow_chain(self, tree: Tree, few: FewDrafts, known: int, guide: Guide) -> None:
        """Of one row alone the likeliest tokens behind one another by a single call, and those beside each of them."""
        computed, before = tree.planned.sequence.computed, self.seconds
        with self._timed(guide):
            tokens, probs = few.chain(known, tree.deepest, guide.width, self._usual_odds(guide), guide.least_of_chain())
            depth = len(tokens)
            tree.fed.update(range(depth - 1))
            self.mark(tree.planned, known, computed + 1)
            beside, least, reach = [], guide.least(), guide.value(tree.planned)
            for at in range(depth):
                grown = tree.children(at - 1, reach, tokens[at], probs[at], guide, at + 1)
                if not grown:  # no token is allowed there
                    break
                tree.add(grown[:1], guide)
                beside += [entry for entry in grown[1:] if entry[0] >= least]
                reach = tree.reach[-1]
            tree.add(beside, guide)
        self._note_chain(computed + 1 - known, depth, self.seconds - before)

    def _usual_odds(self, guide: Guide) -> np.ndarray:
        """Odds of likeliest tokens by their probability, over all rows; looked up now and then."""
        if self._asked % OFTEN == 0:
            middles = [(kind + 0.5) / KINDS for kind in range(KINDS)]
            odds = [guide.acceptance.odds(self.name, kind_of(p), 2, likelihood(p)) for p in middles]
            self._odds = np.array(odds, np.float32)
        self._asked += 1
        return self._odds

    def drafted(self, lag: int, depth: int, lines: int, seconds: float) -> None:
        """Chains were drafted elsewhere: by a forward over `lag` tokens and others, of `lines` tokens in all."""
        self.seconds += seconds
        if lines == lag + depth - 1 and depth > 1:
            self._note_chain(lag, depth, seconds)
        else:  # of several rows
            self.cost.note(round(lines / depth), seconds / depth)

    def _note_chain(self, lag: int, depth: int, seconds: float) -> None:
        """A forward over `lag` tokens and `depth - 1` over one took so long."""
        if lag == 1:
            self.cost.note(1, seconds / depth)
        elif self.cost.knows(1):
            self.cost.note(lag, max(seconds - (depth - 1) * self.cost.seconds(1), seconds / depth))

    @staticmethod
    def _choose(trees: list[Tree], logits: torch.Tensor, width: int) -> Chosen:
        """The tokens and odds behind every node of every frontier."""
        rows = [tree.planned.row.sampling.ahead(tree.path(node)) for tree in trees for node in tree.frontier]
        return choose(logits, rows, width)

    def _catch_up(self, trees: list[Tree], known: list[int]) -> torch.Tensor:
        """Logits behind the last token of each row; what the model has not seen of it yet is computed."""
        rows = []
        for tree, begin in zip(trees, known, strict=True):
            sequence = tree.planned.sequence
            end = sequence.computed + 1
            while end - begin > self.most:  # alone, in parts
                self._run([self._row(tree, begin, begin + self.most, 0)])
                begin += self.most
            rows.append(self._row(tree, begin, end, 1))
        return self._run_in_parts(rows)

    def _row(self, tree: Tree, begin: int, end: int, logits: int) -> PlanRow:
        tokens = tree.planned.sequence.tokens[begin:end]
        return PlanRow(tree, tree.planned.sequence, end - begin, logits, Span(tuple(tokens), begin, begin))

    def _compute(self, trees: list[Tree]) -> torch.Tensor:
        """Logits behind the frontier of each tree."""
        rows = []
        for tree in trees:
            computed, first, count = tree.planned.sequence.computed, tree.frontier[0], len(tree.frontier)
            span = Span(tuple(tree.tokens[first : first + count]), computed + 1 + first, computed)
            if tree.branches:
                positions, visible = tree_places(tree.parents, computed)
                own = slice(first + 1, first + 1 + count)
                span = Span(span.token_ids, span.first, computed, positions[own], visible[own])
            rows.append(PlanRow(tree, tree.planned.sequence, count, count, span))
            tree.fed.update(tree.frontier)
        return self._run(rows)

    def _extend(self, trees: list[Tree], chosen: Chosen, guide: Guide, depth: int) -> None:
        """Add children to every node of every frontier; the best of them are the next frontier."""
        (tokens, probs), least, at = chosen, guide.least(), 0
        for tree in trees:
            grown = []
            for node in tree.frontier:
                reach = tree.reach[node] if node >= 0 else guide.value(tree.planned)
                grown += tree.children(node, reach, tokens[at], probs[at], guide, depth)
                at += 1
            grown.sort(key=lambda entry: -entry[0])
            grown = [entry for entry in grown[: guide.width] if entry[0] >= least]
            tree.add(grown, guide)

    def settle(self, planned: PlanRow, verdict: Verdict, computed: int) -> None:
        """Drafts that were taken and lie in their places are known; `computed` tokens of the row were, before."""
        if self.store is None:
            return
        tree, known = self._trees.get(planned.sequence), computed + 1
        if tree is None:
            return
        for place, node in enumerate(verdict.path):
            if verdict.proposal.origin[node] != place or place not in tree.fed:
                break
            known += 1
        self.mark(planned, computed + 1, known, tree.pages)
