"""Steps with drafts at one visit of Python: what a compiled op is told of them, and what is learned from what it made.

For a request alone, what Python does between two forwards takes as long as half of one: its code has been swept from
the caches by the weights. Here it says once, for several steps, which drafts are worth it; afterwards it goes through
what came of them as if each step had been made by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hf_paged.kernels.native_verified import DEPTHS, MATCHES, MODEL, NODES, Made, Rules, TextRow, Visit
from hf_paged.plan import PlanRow
from hf_paged.speculation.acceptance import ROW_DECAY, ROW_TRUST
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.draft_model import DraftModel
from hf_paged.speculation.drafter import KINDS, RANKS, likelihood
from hf_paged.speculation.guide import MARGIN, Ledger, Overhead
from hf_paged.speculation.lookup import PRIOR
from hf_paged.speculation.proposal import Proposal, Verdict
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.texts import RowDrafting

MOST = 16  # steps at a visit
FAR = 128  # slots that a visit takes at most, about
SIZES = 48  # drafts of one step
NODE = 2e-6  # seconds of a draft outside all forwards
STALE = 12  # visits behind which what steps without drafts take is measured anew, in a burst
CLEAR = 1.25  # a gain with which that can wait, four times as long
OFTEN = 4  # visits between two looks at odds and costs
ENDING = 4  # one of so many rows may end before a visit does, where nobody waits for its place
LONGEST_REST = 4  # visits that are not made where as many did not pay


class Step(NamedTuple):
    """Rows of a step that had not ended, tokens that it gave, and what became of its drafts."""

    rows: int
    tokens: int
    verdicts: list[tuple[PlanRow, Verdict]]


@dataclass(eq=False)
class Odds:
    """Tables of a speculator's odds, without those of rows: looked at now and then."""

    speculator: Speculator
    visits: int = 0
    looked: np.ndarray | None = None
    drafted: np.ndarray | None = None

    def look(self) -> None:
        """Look at what is known by now."""
        self.visits += 1
        if self.looked is not None and self.visits % OFTEN:
            return
        odds, drafter = self.speculator.acceptance.odds, self.speculator.drafter
        depths = range(1, DEPTHS + 1)
        table = [[odds("lookup", kind, depth, PRIOR[kind]) for kind in range(MATCHES)] for depth in depths]
        self.looked, self.drafted = np.array(table, np.float32), np.zeros((DEPTHS, RANKS * KINDS), np.float32)
        if drafter is not None:
            kinds = [
                (kind + KINDS * rank, rank, (kind + 0.5) / KINDS) for rank in range(RANKS) for kind in range(KINDS)
            ]
            for depth in depths:
                row = [odds(drafter.name, kind, depth, likelihood(prob, rank)) for kind, rank, prob in kinds]
                self.drafted[depth - 1] = row


@dataclass(eq=False)
class Plan:
    """What is to be done at a visit.

    Attributes:
        model: who drafts where texts do not, or None. steps: most of them. ledger: of each.
    """

    speculator: Speculator
    work: Sequence[PlanRow]
    rules: Rules
    rows: list[TextRow]
    steps: int
    ledger: Ledger
    model: DraftModel | None
    soon: int

    @property
    def deepest(self) -> int:
        """Drafts of a row in one step."""
        return max(self.rules.deepest if self.rules.ngram else 0, self.rules.chain)


class Visits:
    """Plans visits for a speculator's rows, and learns from them.

    Args:
        bursts: what whole steps without drafts take, by rows.
    """

    def __init__(self, speculator: Speculator, bursts: CostTable) -> None:
        self.speculator, self.odds, self.bursts = speculator, Odds(speculator), bursts
        self.misses = 0  # visits on end that did not pay
        self.since = 0  # visits since steps without drafts were made instead
        self._clear = False  # whether the latest one gained much
        self.overhead = Overhead(node=NODE)  # of steps without drafts in bursts, of others in visits
        self._size = 0, 0  # rows and drafts whose costs are known
        self._known: tuple[Ledger, np.ndarray] | None = None

    def serve(self, soon: int) -> bool:
        """Whether there may be something to plan. soon: as in `Speculator.propose`."""
        spec = self.speculator
        if not spec.config.adaptive or spec.config.method not in ("draft", "lookup", "auto"):
            return False
        return not (spec.has_drafter and spec.trial.idle(soon))

    def plan(self, work: Sequence[PlanRow], budget: int, waits: bool, soon: int) -> Plan | None:
        """What to do at a visit for rows that each have one token to compute; None: it is to be made step by step.

        Args:
            budget: drafts that a step can take. waits, soon: as in `Speculator.propose`.
        """
        spec, count = self.speculator, len(work)
        config = spec.config
        if not spec.cost.of(count).knows(count) or config.confidence_threshold or budget <= 0:
            return None
        model, steps, known = None, MOST, {}
        if spec.has_drafter:
            model = spec.drafter if type(spec.drafter) is DraftModel and spec.drafter.store is not None else None
            if model is None or model.sizes is not None or not model.ready():
                return None
            few = getattr(model.forward, "few_model", int)()
            if not few or min(few.slots, model.longest) < max(len(planned.row.tokens) for planned in work) + FAR:
                return None
            known = {planned: model.known(planned) for planned in work}
            if sum(len(planned.row.tokens) - at for planned, at in known.items()) > min(few.most, budget):
                return None  # it has to read whole prompts
        if config.method == "auto":  # the suffix index is asked step by step
            steps = min(steps, spec.texts.next_look(work, spec.steps + 1))
            if not steps:
                return None
        ledger, seconds = self._costs(count, min(budget, SIZES + count - 1))
        if model is not None:
            drafts = spec.tries(ledger, soon)
            steps = min(steps, 1 + spec.trial.left)
            model = model if drafts else None
        values = {} if waits else spec.worths(work, work, ledger, spec.steps + 1)
        self.odds.look()
        rules = self._rules(ledger, model, seconds)
        rules.ending = 0 if waits else count // ENDING
        if model is None:
            known = {}
        rows = [self._row(planned, known.get(planned), values.get(planned, 1.0)) for planned in work]
        return Plan(spec, work, rules, rows, steps, ledger, model, soon)

    def _costs(self, rows: int, most: int) -> tuple[Ledger, np.ndarray]:
        """What a step of so many rows costs, and with up to `most` drafts; looked up now and then."""
        if (rows, most) != self._size or self.odds.visits % OFTEN == 0:
            cost = self.speculator.cost
            ledger = Ledger(cost.of(rows), self.overhead, rows, rows, cost.rows)
            self._known = ledger, np.array([ledger.seconds(n) for n in range(most + 1)])
            self._size = rows, most
        return self._known

    def _rules(self, ledger: Ledger, model: DraftModel | None, seconds: np.ndarray) -> Rules:
        spec = self.speculator
        config, rows, expected, price, behind, forward = spec.config, ledger.drawn, 0.0, 0.0, 1.0, np.zeros(1)
        if model is not None:
            behind, forward = spec.acceptance.any_odds(model.name, 2), self._forwards(model, rows)
            expected, price = spec.expected_of_model(), spec.price_of_model(ledger, rows)
        return Rules(
            ngram=config.max_matching_ngram_size if config.method in ("lookup", "auto") else 0,
            deepest=min(config.deepest_of_texts, NODES),
            usual=config.deepest,
            chain=min(config.deepest, NODES) if model is not None else 0,
            width=config.tree_width,
            kinds=KINDS,
            margin=MARGIN,
            cheapest=ledger.cheapest,
            least=ledger.worth(),
            plain=ledger.plain(),
            behind=behind,
            row_decay=ROW_DECAY,
            row_trust=ROW_TRUST,
            expected=expected,
            price=price,
        ).with_tables(self.odds.looked, self.odds.drafted, seconds, forward)

    @staticmethod
    def _forwards(model: DraftModel, rows: int) -> np.ndarray:
        """Seconds of the draft model's forwards over up to `rows` lines: as measured, or as one line would take."""
        one = model.cost.seconds(1)
        return np.array([0.0, *(max(model.cost.seconds(n), one) for n in range(1, rows + 1))])

    def _row(self, planned: PlanRow, known: int | None, value: float) -> TextRow:
        row, spec = planned.row, self.speculator
        state = RowDrafting.of(row, spec.steps + 1)
        names = "lookup", spec.drafter.name if spec.drafter is not None else "draft"
        records = tuple((r.taken, r.expected) for r in map(state.record, names))
        text = state.read_in(row.tokens, row.prompt_length + row.request.max_tokens + NODES)
        length = len(row.tokens)
        return TextRow(text, length, 0, row.left, row.stops, length if known is None else known, records, value)

    # -- what came of it

    def learn(self, plan: Plan, index: int, verdicts: Sequence[tuple[PlanRow, Verdict]], visit: Visit) -> None:
        """Note what became of the drafts of step `index`."""
        spec = self.speculator
        spec.learn_step(plan.ledger, plan.soon if index and spec.has_drafter else None, verdicts)
        if plan.model is not None and visit.chains[index][1]:
            plan.model.drafted(*visit.chains[index], visit.seconds[index][1])

    def rest(self, steps: Sequence[Step], seconds: float, plan: Plan) -> int:
        """Visits for which it is not worth to look again: more and more, where steps without drafts were faster.

        Args:
            seconds: of all these steps.
        """
        rows, tokens = sum(step.rows for step in steps), sum(step.tokens for step in steps)
        usual = sum(self.bursts.seconds(step.rows) for step in steps)
        found = any(step.verdicts for step in steps)
        paid = found and (not usual or tokens * usual > rows * seconds)
        self._clear = paid and tokens * usual > CLEAR * rows * seconds
        self.misses = 0 if paid or plan.speculator.has_drafter else min(self.misses + 1, LONGEST_REST)
        return self.misses

    def stale(self) -> bool:
        """Whether it is time to see again what steps without drafts take."""
        return not self.speculator.has_drafter and self.since >= (4 if self._clear else 1) * STALE

    def settle(self, plan: Plan, visit: Visit) -> None:
        """The draft model has KV of so many of the row's tokens."""
        for planned, row, known in zip(plan.work, plan.rows, visit.known, strict=True):
            if plan.model is not None and planned.row.sequence is not None:
                plan.model.mark(planned, row.known, known)


def verdict_of(plan: Plan, made: Made, taken: int, ended: bool) -> Verdict | None:
    """What a step made of the drafts of a row that took so many tokens; None where there were none."""
    if not made.tokens:
        return None
    name = plan.model.name if made.source == MODEL else "lookup"
    proposal = Proposal(made.tokens, made.parents, made.kinds, made.odds, name)
    return Verdict(proposal, made.path[: taken - 1], ended)
