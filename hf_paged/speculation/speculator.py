"""Who drafts what in a step: proposers, what they are known to be worth, and what the step can take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf

from hf_paged.plan import PlanRow
from hf_paged.request import Row
from hf_paged.speculation.acceptance import Acceptance
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.cost import StepCosts
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.guide import Guide, Ledger, Overhead, choose
from hf_paged.speculation.proposal import Proposal, Verdict
from hf_paged.speculation.stats import Tally
from hf_paged.speculation.suffix import SuffixIndex
from hf_paged.speculation.texts import RowDrafting, Texts
from hf_paged.speculation.trial import Trial
from hf_paged.speculation.worth import Worths

LASTING = 0.99  # of what was expected and taken in the steps before
FREE = 1 << 30  # steps: as many as the engine likes
DRAFTED = 4  # depths of a draft model's drafts that are weighed against those of texts
READS = 8  # tokens a row that a draft model takes in where it reads prompts
ENOUGH = 4  # tokens a row that are yet to come, for a draft model that has prompts to read to be tried
SUREST = 4  # one of so many rows has a draft that is taken nearly always


class Speculator:
    """Drafts for the rows of requests that share its settings.

    Args:
        config: see `SpeculationConfig`.
        cost, overhead: of the target's steps, kept by the engine.
        suffixes: what the suffix proposer knows, shared by all speculators of an engine.
        drafter: a draft model, or the target's first layers.
        measured: as in `Proposers`.

    Attributes:
        steps: that were made so far, the present one included.
        free: steps, the latest included, for which there is nothing to do.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        cost: StepCosts,
        overhead: Overhead,
        suffixes: SuffixIndex | None = None,
        drafter: Drafter | None = None,
        measured: Callable[[float], float] = float,
    ) -> None:
        self.config, self.cost, self.overhead, self.suffixes, self.drafter = config, cost, overhead, suffixes, drafter
        self.measured, self.acceptance = measured, Acceptance()
        self.texts = Texts(config, self.acceptance, suffixes)
        self.tallies: dict[str, Tally] = {}
        self.trial = Trial()
        self.steps = self.free = 0
        self._plain = 0.0  # seconds of this step, were it without drafts
        self._drawn = 0  # rows that draw in it
        self._reach, self._taken = 0.0, 0  # drafts of this step that are expected to be taken, and that were
        self._values: dict[PlanRow, float] = {}  # what a token of a row is worth, where that is not 1
        self._worths = Worths()
        self._reached, self._took = 0.0, 0.0  # the same of the latest steps

    def propose(
        self,
        rows: Sequence[PlanRow],
        tokens: int,
        drawn: int,
        budget: int,
        waits: bool,
        soon: int,
        reserve: Callable[[PlanRow, int], bool],
    ) -> dict[PlanRow, Proposal]:
        """Drafts for some of `rows`, each of which is to compute its last token.

        Args:
            tokens, drawn: tokens that the step computes, and rows that draw, without drafts.
            budget: drafts that the step can take.
            waits: whether other rows wait for the places of these. soon: rows that decode once prompts have been read;
                a draft model that does not pay for so many has read prompts in vain.
            reserve: makes slots for so many drafts of a row writable, or says that it cannot.
        """
        self._reach, self._taken, self._plain, self.free = 0.0, 0, 0.0, 0
        self.steps += 1
        asked = self.texts.due(rows, self.steps)
        if budget <= 0 or not (asked or self.has_drafter):
            self.free = FREE if budget > 0 else 0
            return {}
        cost = self.cost.of(drawn)
        if self.config.adaptive and not cost.knows(tokens):
            return {}  # beside steps that are not known any draft would seem to cost nothing
        ledger = Ledger(cost, self.overhead, tokens, drawn, self.cost.rows) if self.config.adaptive else None
        self._drawn, self._plain = drawn, ledger.seconds(0) if ledger is not None else 0.0
        drafts = self.has_drafter and (ledger is None or self.tries(ledger, soon, rows))
        if not (asked or drafts):
            self.free = 0 if self.trial.trying else FREE
            return {}
        depths = {planned: self._deepest(planned.row, budget) for planned in (rows if drafts else asked)}
        depths = {planned: depth for planned, depth in depths.items() if depth > 0}
        if not depths:
            return {}
        closed = ledger is not None and not waits and drawn == len(rows)
        self._values = self.worths(rows, depths, ledger, self.steps) if closed else {}
        asked = [planned for planned in asked if planned in depths]
        begun = time.perf_counter()
        offers = self._looked_up(asked, depths, ledger)
        self.texts.looked(self.measured(time.perf_counter() - begun), len(asked))
        if drafts:
            drafting = [planned for planned in depths if planned not in offers]
            if ledger is not None and self.config.method == "auto":
                drafting = self._better_drafted(depths, offers, ledger)
            offers |= self._drafted({planned: depths[planned] for planned in drafting}, ledger, reserve)
        chosen, self._reach = choose(offers, self._values, ledger, budget) if offers else ({}, 0.0)
        if ledger is not None:
            self.texts.put_off(asked, chosen, self.steps, drawn)
            if not (chosen or drafts or self.trial.trying):
                self.free = 1 + self.texts.next_look(rows, self.steps + 1)
        return {planned: proposal for planned, proposal in chosen.items() if reserve(planned, len(proposal))}

    def _deepest(self, row: Row, budget: int) -> int:
        """Drafts one behind another that can be of use: the last token of a row is drawn behind the last of them."""
        return min(self.config.deepest_of_texts, row.left - 1, budget)

    @property
    def has_drafter(self) -> bool:
        """Whether there is a draft model that serves."""
        return self.drafter is not None and not self.drafter.failed

    def _looked_up(
        self, asked: Sequence[PlanRow], depths: dict[PlanRow, int], ledger: Ledger | None
    ) -> dict[PlanRow, Proposal]:
        """What texts offer."""
        offers = {}
        for planned in asked:
            least = ledger.cheapest / max(self._value(planned), 1e-9) if ledger is not None else 0.0
            offer = self.texts.best(planned.row, self.steps, depths[planned], least)
            if offer is not None:
                offers[planned] = offer
        return offers

    def worths(
        self, rows: Sequence[PlanRow], asked: Iterable[PlanRow], ledger: Ledger, step: int
    ) -> dict[PlanRow, float]:
        """What a token is worth of those of `rows` that are `asked` about, where no row waits for another's place."""
        return self._worths.of(rows, asked, ledger, step) if len(rows) > 1 else {}

    def _value(self, planned: PlanRow) -> float:
        return self._values.get(planned, 1.0)

    def _state(self, row: Row) -> RowDrafting:
        return RowDrafting.of(row, self.steps)

    # -- the draft model

    def _better_drafted(
        self, depths: dict[PlanRow, int], offers: dict[PlanRow, Proposal], ledger: Ledger
    ) -> list[PlanRow]:
        """Rows for which the draft model promises more tokens than what texts offer, its time taken into account."""
        expected, price = self.expected_of_model(), self.price_of_model(ledger, len(depths))
        return [p for p in depths if (expected - sum(_reach(offers.get(p)))) * self._value(p) > price]

    def tries(self, ledger: Ledger, soon: int, rows: Sequence[PlanRow] = ()) -> bool:
        """Whether the draft model is to draft in the next step.

        Args:
            soon: as in `propose`. rows: those of which it may have to read whole prompts first.
        """
        drafts = self.trial.drafts(soon, partial(self._promise, ledger, soon))
        if drafts and self.trial.trying and sum(planned.row.left for planned in rows) < ENOUGH * len(rows):
            self.trial.put_off()
            return False
        return drafts

    def _promise(self, ledger: Ledger, soon: int) -> float:
        """Tokens a second with drafts of the model for `soon` rows over those without, as odds and costs have it."""
        if soon != ledger.drawn:  # some are still being read
            cost = self.cost.of(soon)
            if not cost.knows(soon):
                return inf
            ledger = Ledger(cost, self.overhead, soon, soon, self.cost.rows)
        rows, total, reach, one = ledger.drawn, float(ledger.drawn), 1.0, self.drafter.cost.seconds(ledger.drawn)
        surest = rows // SUREST  # a step may take few of them, the surest ones
        best = (total + surest) / (ledger.seconds(surest) + one)
        for depth in range(1, min(DRAFTED, self.config.deepest) + 1):
            reach *= self.acceptance.any_odds(self.drafter.name, depth)
            total += rows * reach
            best = max(best, total / (ledger.seconds(rows * depth) + depth * one))
        return best / ledger.plain()

    def expected_of_model(self) -> float:
        """Drafts of the draft model that are taken in a step, about."""
        reach, expected = 1.0, 0.0
        for depth in range(1, min(DRAFTED, self.config.deepest) + 1):
            reach *= self.acceptance.any_odds(self.drafter.name, depth)
            expected += reach
        return expected

    def price_of_model(self, ledger: Ledger, rows: int) -> float:
        """Tokens of a row that could be had in the time that these take to be made for so many."""
        return DRAFTED * self.drafter.cost.seconds(rows) * ledger.plain() / max(rows, 1)

    def _drafted(
        self, depths: dict[PlanRow, int], ledger: Ledger | None, reserve: Callable[[PlanRow, int], bool]
    ) -> dict[PlanRow, Proposal]:
        if not depths:
            return {}
        drafter, rows = self.drafter, list(depths)
        records = {planned: self._state(planned.row).record(drafter.name) for planned in rows}
        threshold = self.config.confidence_threshold
        parts = drafter.cost, self.config.tree_width, threshold, records, self._values
        guide = Guide(drafter.name, self.acceptance, ledger, *parts)
        made = drafter.propose(rows, [min(depth, self.config.deepest) for depth in depths.values()], guide, reserve)
        return {planned: proposal for planned, proposal in zip(rows, made, strict=True) if proposal is not None}

    # -- what came of it

    def begin_anew(self) -> None:
        """The draft model is not what it was."""
        self.acceptance.forget(self.drafter.name)
        self.trial, self._reached, self._took = Trial(), 0.0, 0.0

    def judge(self, planned: PlanRow, verdict: Verdict, computed: int) -> None:
        """Learn from what the target made of a row's drafts; `computed` of its tokens were, before."""
        self.learn(planned.row, verdict)
        if self._by_model(verdict):
            self.drafter.settle(planned, verdict, computed)

    def _by_model(self, verdict: Verdict) -> bool:
        return self.drafter is not None and verdict.proposal.source == self.drafter.name

    def learn(self, row: Row, verdict: Verdict) -> None:
        """Note what became of a row's drafts."""
        source = verdict.proposal.source
        self.acceptance.note(verdict, self._state(row).record(source))
        self.tallies.setdefault(source, Tally()).add(verdict)
        metrics = row.request.metrics
        metrics.draft_tokens += len(verdict.proposal)
        metrics.accepted_tokens += verdict.accepted
        metrics.verified_steps += 1
        self._taken += verdict.accepted
        if self._drawn and not self._by_model(verdict):
            self.texts.paid(verdict.accepted * self._plain / self._drawn)

    def learn_step(self, ledger: Ledger, soon: int | None, verdicts: Sequence[tuple[PlanRow, Verdict]]) -> None:
        """Note what became of the drafts of a step that was not asked about; the draft model knows already.

        Args:
            soon: rows of a step of which the draft model is to be tried; None: it is not.
        """
        self._taken, self.free = 0, 0
        self._reach = sum(sum(verdict.proposal.reach()) for _, verdict in verdicts)
        self.steps += 1
        self._drawn, self._plain = ledger.drawn, ledger.seconds(0)
        if soon is not None:
            self.tries(ledger, soon)
        for planned, verdict in verdicts:
            self.learn(planned.row, verdict)

    def rested(self, steps: int) -> None:
        """So many steps were made without asking."""
        self.steps += steps
        self.trial.rested(steps)

    def stepped(self, tokens: int, seconds: float, usual: float = inf, rested: float = 0.0) -> None:
        """What the whole step made and took; `seconds` of one that computed prompts: 0.

        Args:
            usual: seconds of such a step among many without drafts, at most.
            rested: seconds of the steps before it, in which nothing was asked.
        """
        self.texts.stepped(seconds + rested)
        self._reached = LASTING * self._reached + self._reach
        self._took = LASTING * self._took + self._taken
        if self._plain and self._drawn:
            # What tokens are worth is not asked: rows that lag are drafted for until they no longer do.
            expected = self._reach * (self._took + 1) / (self._reached + 1)
            reads = self.drafter is not None and self.drafter.lag > READS * self._drawn
            made = (tokens - self._taken + expected) / self._drawn
            self.trial.note(made, seconds / self._plain, reads, usual / self._plain)
        if self.drafter is not None:
            self.drafter.lag = 0

    def ended(self, row: Row) -> None:
        """A row has ended: what it wrote is known to the suffix index."""
        if row.drafting is not None and row.drafting.text is not None:
            self.suffixes.update(row.drafting.text)


def _reach(proposal: Proposal | None) -> list[float]:
    return proposal.reach() if proposal is not None else []
