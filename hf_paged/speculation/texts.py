"""Drafts that cost next to nothing: what known texts have behind the same tokens, and when it is worth to look."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_paged.kernels.native_verified import Followed
from hf_paged.plan import PlanRow
from hf_paged.request import Row
from hf_paged.speculation.acceptance import DEPTHS, Acceptance, RowRecord
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.lookup import LONGEST_MATCH, PRIOR, NgramIndex, lookup
from hf_paged.speculation.proposal import Proposal
from hf_paged.speculation.suffix import SuffixIndex, Text

# A row whose texts are of no use so many times on end waits until they are looked at again, for more and more steps, up
# to some times as many as rows draw; rows that wait as long are looked at in the same ones.
PATIENCE, LEAST_LONGEST = 3, 7
# Of the seconds that their drafts save, and of all others, so much may go into looks; at most so many are saved up.
SAVED, SHARE, PURSE = 0.2, 0.008, 0.02
NEXT = 8  # steps until it is asked again whether that can be paid
STUMBLE, LATEST = 4, 128  # a look counts as so many times the dearest of the latest at most, for each row


@dataclass(eq=False)
class RowDrafting:
    """What a speculator keeps of one row.

    Attributes:
        begun: the step in which it began, had it made a token a step before it was seen.
        records: by proposer.
        worth: what a token of it was worth at the last look, see `Worths`.
        until: the step in which texts are looked at again. misses: times on end that they were of no use.
        ids: its tokens as they were at the latest visit, with room for those to come; `read` of them.
    """

    begun: int
    records: dict[str, RowRecord] = field(default_factory=dict)
    ngrams: NgramIndex | None = None
    text: Text | None = None
    worth: float | None = None
    until: int = 0
    misses: int = 0
    ids: np.ndarray | None = None
    read: int = 0

    @classmethod
    def of(cls, row: Row, step: int) -> RowDrafting:
        """That of `row`, made at `step` where there is none yet."""
        if row.drafting is None:
            row.drafting = cls(step - len(row.output_ids))
        return row.drafting

    def record(self, source: str) -> RowRecord:
        return self.records.setdefault(source, RowRecord())

    def read_in(self, tokens: Sequence[int], most: int) -> np.ndarray:
        """The row's tokens as an array of `most`. (Again in case of the last one, which may have been thrown away.)"""
        if self.ids is None or len(self.ids) < most:
            self.ids, self.read = np.zeros(most, np.int64), 0
        begin, self.read = min(self.read, len(tokens) - 1), len(tokens)
        self.ids[begin : self.read] = tokens[begin:]
        return self.ids


class Texts:
    """Lookup and the suffix index, as the settings have them.

    Args:
        acceptance: of the speculator that asks.
        suffixes: None where they are not asked for.

    Attributes:
        purse: seconds that looks may take now.
    """

    def __init__(self, config: SpeculationConfig, acceptance: Acceptance, suffixes: SuffixIndex | None) -> None:
        self.config, self.acceptance, self.suffixes = config, acceptance, suffixes
        self.purse = PURSE
        self._looks: deque[float] = deque(maxlen=LATEST)  # seconds a row

    def due(self, rows: Sequence[PlanRow], step: int) -> list[PlanRow]:
        """The rows for which texts are looked at in this step: all whose time has come, if that can be paid. Drafts of
        many rows may pay where those of one do not."""
        if self.config.method in ("draft", "layer_skip") or (self.config.adaptive and self.purse < 0):
            return []
        known = [(planned, planned.row.drafting) for planned in rows]  # of each step's rows: no calls but for those due
        return [planned for planned, state in known if state is None or state.until <= step]

    def looked(self, seconds: float, rows: int = 1) -> None:
        """Looks for so many rows took so long.

        One that stumbled, as it may on a shared machine by the hundredfold, must not bar all others for minutes.
        """
        if not rows:
            return
        each = seconds / rows
        if self._looks:
            each = min(each, STUMBLE * max(self._looks))
        self._looks.append(each)
        self.purse -= each * rows

    def next_look(self, rows: Sequence[PlanRow], step: int) -> int:
        """Steps from `step` on before texts are to be looked at for any of the rows."""
        if self.purse < 0:
            return NEXT
        states = [planned.row.drafting for planned in rows]
        return min([max(state.until - step, 0) if state is not None else 0 for state in states])

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self.purse = min(self.purse + SHARE * seconds, PURSE)

    def paid(self, seconds: float) -> None:
        """Tokens that texts had given would have taken so long."""
        self.purse = min(self.purse + SAVED * seconds, PURSE)

    def put_off(self, asked: Sequence[PlanRow], chosen: Container[PlanRow], step: int, drawn: int) -> None:
        """Rows that were looked at: those for which nothing paid are looked at less and less often.

        Args:
            chosen: those of which drafts are verified. drawn: rows that draw in the step.
        """
        longest = 1 << max(LEAST_LONGEST, drawn).bit_length() + 1
        for planned in asked:
            state = RowDrafting.of(planned.row, step)
            state.misses = 0 if planned in chosen else state.misses + 1
            wait = min(1 << max(state.misses - PATIENCE, 0), longest)
            state.until = (step // wait + 1) * wait

    def best(self, row: Row, step: int, depth: int, least: float) -> Proposal | None:
        """What lookup and the suffix index offer, of both the one that promises more.

        Args:
            depth: drafts at most. least: odds of the first one below which they are of no use.
        """
        state = RowDrafting.of(row, step)
        found = [self._with_odds(state, proposal) for proposal in self.of(row, state, depth, least)]
        return max(found, key=lambda proposal: sum(proposal.reach()), default=None)

    def of(self, row: Row, state: RowDrafting, depth: int, least: float) -> list[Proposal]:
        """What each of them offers, with its own odds."""
        found, method, usual = [], self.config.method, self.config.deepest
        if method in ("lookup", "auto"):
            if state.ngrams is None:
                state.ngrams = NgramIndex(self.config.max_matching_ngram_size)
            record = state.record("lookup")

            def hopeful(kind: int) -> bool:
                return self.acceptance.odds("lookup", kind, 1, PRIOR[kind], record) >= least

            found.append(lookup(state.ngrams, row.tokens, depth, hopeful, usual))
        if method in ("suffix", "auto") and self.suffixes is not None:
            found.append(self.suffixes.propose(self._text(row, state), depth, self.config.tree_width, usual))
        return [proposal for proposal in found if proposal is not None]

    def _text(self, row: Row, state: RowDrafting) -> Text:
        if state.text is None:
            state.text = self.suffixes.open(row.tokens, _reader(row))
        return state.text

    def followed(
        self, rows: Sequence[PlanRow], step: int, ahead: int, others: int
    ) -> dict[PlanRow, Followed | None] | None:
        """What rows whose time has come repeat without doubt, with so many tokens that come next; None where more than
        so many `others` of them repeat nothing: all are to be looked at more closely then."""
        found: dict[PlanRow, Followed | None] = {}
        for planned in self.due(rows, step) if self.suffixes is not None else ():
            text = self._text(planned.row, RowDrafting.of(planned.row, step))
            repeated = self.suffixes.followed(text)
            if repeated is None:
                others -= 1
                if others < 0:
                    return None
                found[planned] = None
                continue
            other, at = repeated
            begin = max(at - LONGEST_MATCH, 0)
            tokens = np.array(other.tokens[begin : at + ahead], np.int64) if other is not text else None
            found[planned] = Followed(tokens, 0 if tokens is None else begin, at - len(text.tokens))
        return found

    def _with_odds(self, state: RowDrafting, proposal: Proposal) -> Proposal:
        """The same with the odds that were seen."""
        record, depths = state.record(proposal.source), [min(depth, DEPTHS) for depth in proposal.depths()]
        places = list(zip(proposal.kinds, depths, proposal.odds, strict=True))
        # Most drafts of a long chain are alike.
        seen = {place: self.acceptance.odds(proposal.source, *place, record) for place in set(places)}
        odds = tuple([seen[place] for place in places])
        return Proposal(proposal.tokens, proposal.parents, proposal.kinds, odds, proposal.source)


def _reader(row: Row) -> Hashable:
    """Who may see a row's text: rows of the same salt, or the row alone where its request shares nothing.

    Whether the engine shares KV does not matter.
    """
    return row if row.request.params.prefix_caching is False else row.salt
