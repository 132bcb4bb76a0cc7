"""Drafts of a model with another vocabulary, by way of text.

After "universal assisted generation" (Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding
Algorithms for Heterogeneous Vocabularies", ICML 2025). Whatever becomes of the text, a row's tokens are the target's
own: drafts are only held against them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from math import ceil, isnan, prod
from typing import Any

import torch

from hf_paged.memory import Memory, OutOfPages
from hf_paged.plan import PlanRow, StepPlan
from hf_paged.sequence import Sequence
from hf_paged.speculation.drafter import KINDS, Drafter, kind_of, likelihood
from hf_paged.speculation.guide import Guide
from hf_paged.speculation.mirror import Mirror, Vocabulary
from hf_paged.speculation.proposal import MOST_NODES, Proposal
from hf_paged.store import KVStore


@dataclass(eq=False)
class Chain:
    """Drafts of one row in the making, as tokens of the draft model: at most `most`, each with its probability."""

    planned: PlanRow
    mirror: Mirror
    deepest: int
    most: int
    probs: list[float] = field(default_factory=list)
    reach: float = 1.0

    @property
    def sequence(self) -> Sequence:
        return self.mirror.sequence


class UniversalDraft(Drafter):
    """Drafts by a causal model with another vocabulary.

    It reads each row's text in its own tokens and goes on with its likeliest ones (noise that is keyed by token couples
    nothing across vocabularies); what they say, in the target's tokens, is a chain of drafts. Its KV lies in pages of
    its own. A row for which these do not suffice, or whose text is too long for the draft model, gets no drafts.

    Args:
        settings: see `Drafter`.
    """

    def __init__(
        self,
        forward: Callable[[StepPlan], torch.Tensor],
        store: KVStore,
        target: Vocabulary,
        draft: Vocabulary,
        **settings: Any,
    ) -> None:
        super().__init__(forward, store, store.page_size, **settings)
        self.target, self.draft = target, draft
        self.memory = Memory(store.num_pages, store.page_size)
        self._mirrors: dict[Sequence, Mirror] = {}  # by the target's sequence
        self._unsure = False  # whether an exception has come in the middle of something

    # -- its own memory

    def forget(self) -> None:
        """No KV is known any more."""
        self._unsure = True
        self.tidy(set())

    def tidy(self, alive: set[Sequence]) -> None:
        """Release what was kept of rows that have ended or wait; after an exception, of all."""
        if self._unsure:
            self._mirrors = {}
        gone = [sequence for sequence in self._mirrors if sequence not in alive]
        if not gone and not self._unsure:
            return
        self._unsure = True
        for sequence in gone:
            del self._mirrors[sequence]
        self.memory.repair({mirror.sequence for mirror in self._mirrors.values()})
        self._unsure = False

    def check(self, alive: set[Sequence]) -> None:
        """Verify the laws of its memory: each of its sequences belongs to one that is open.

        Raises:
            AssertionError: one does not hold.
        """
        self.tidy(alive)
        self.memory.check()
        if {mirror.sequence for mirror in self._mirrors.values()} != self.memory.sequences:
            raise AssertionError("the draft model's sequences are not those of its rows")

    def _room(self, sequence: Sequence) -> bool:
        """Whether all tokens of a sequence have slots, or get them."""
        try:
            self.memory.reserve(sequence, sequence.pending)  # nothing is shared: nothing is to be copied
        except OutOfPages:
            return False
        return True

    # -- drafts

    def _draft(
        self, rows: Rows[PlanRow], deepest: Rows[int], guide: Guide, reserve: Callable[[PlanRow, int], bool]
    ) -> list[Proposal | None]:
        if self._unsure:
            self.tidy(set())
        self._unsure = True
        with self._timed(guide):
            chains = [self._chain(planned, depth, guide) for planned, depth in zip(rows, deepest, strict=True)]
        self._grow([chain for chain in chains if chain is not None], guide)
        with self._timed(guide):
            made = [self._proposal(chain, guide) if chain is not None and chain.probs else None for chain in chains]
        self._unsure = False
        return made

    def _chain(self, planned: PlanRow, deepest: int, guide: Guide) -> Chain | None:
        """Where a row's drafts begin; None where it gets none."""
        mirror = self._mirrors.get(planned.sequence)
        if mirror is None:
            mirror = self._mirrors[planned.sequence] = Mirror(self.target, self.draft, self.memory.open([]))
        mirror.follow(planned.sequence.tokens, self.memory)
        most = min(ceil(deepest * mirror.ratio), self.longest - mirror.length, MOST_NODES)
        if most <= 0 or not mirror.length or not self._room(mirror.sequence):
            return None
        return Chain(planned, mirror, deepest, most, reach=guide.value(planned))

    def _grow(self, chains: list[Chain], guide: Guide) -> None:
        deepest, depth = max((chain.most for chain in chains), default=0), 1
        while chains:
            with self._timed(guide, sum(chain.sequence.pending for chain in chains)):
                self._extend(chains, self._compute(chains), guide, depth)
            depth += 1
            chains = [chain for chain in chains if depth <= chain.most and self._room(chain.sequence)]
            if not guide.goes_on(depth, [chain.reach for chain in chains], deepest):
                return

    def _compute(self, chains: list[Chain]) -> torch.Tensor:
        """Logits behind the last token of each chain; what the model has not seen yet is computed."""
        for chain in chains:
            while chain.sequence.pending > self.most:  # alone, in parts
                self._run([PlanRow(chain, chain.sequence, self.most, 0)])
                self.memory.commit(chain.sequence, self.most)
        rows = [PlanRow(chain, chain.sequence, chain.sequence.pending, 1) for chain in chains]
        logits = self._run_in_parts(rows)
        for row in rows:
            self.memory.commit(row.sequence, row.count)
        return logits

    def _extend(self, chains: list[Chain], logits: torch.Tensor, guide: Guide, depth: int) -> None:
        """Add the likeliest token to each chain, or end it."""
        probs, ids = logits.softmax(1).max(1)
        least = guide.least()
        for chain, prob, token in zip(chains, probs.tolist(), ids.tolist(), strict=True):
            if isnan(prob):
                raise FloatingPointError("the draft model's logits hold NaN")
            reach = chain.reach * guide.odds(chain.planned, kind_of(prob), depth, likelihood(prob))
            if prob < guide.threshold or reach < least:
                chain.most = 0
                continue
            chain.sequence.tokens.append(token)
            chain.probs.append(prob)
            chain.reach = reach
            if token in self.draft.closing:
                chain.most = 0
            guide.add([reach])

    def _proposal(self, chain: Chain, guide: Guide) -> Proposal | None:
        """What a chain says, in the target's tokens. Each has the probability of its share of the chain."""
        tokens = chain.mirror.drafts(chain.planned.sequence.tokens)
        probs, count, ended = chain.probs, len(tokens), chain.sequence.tokens[-1] in self.draft.closing
        kinds, odds = [], []
        for at, token in enumerate(tokens[: chain.deepest]):
            if token >= self.target.size:
                break
            first = at * len(probs) // count
            prob = prod(probs[first : max((at + 1) * len(probs) // count, first + 1)])
            # The last one may be the beginning of a longer token: what is seen of such is kept apart.
            kinds.append(kind_of(prob) + KINDS * (at == count - 1 and not ended))
            odds.append(guide.odds(chain.planned, kinds[-1], at + 1, likelihood(prob)))
        if not kinds:
            return None
        parts = (tokens[: len(kinds)], range(-1, len(kinds) - 1), kinds, odds)
        return Proposal(*map(tuple, parts), self.name)
