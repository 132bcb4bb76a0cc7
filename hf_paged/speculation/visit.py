"""Steps with drafts at one visit of Python: what a compiled op is told of them, and what is learned from what it made.

For a request alone, what Python does between two forwards takes as long as half of one: its code has been swept from
the caches by the weights. Here it says once, for several steps, which drafts are worth it; afterwards it goes through
what came of them as if each step had been made by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hf_paged.kernels.native_verified import FOLLOWED, MODEL, NODES, Followed, Made, Rules, TextRow, Visit
from hf_paged.plan import PlanRow
from hf_paged.speculation.acceptance import ROW_DECAY, ROW_TRUST
from hf_paged.speculation.cost import CostTable
from hf_paged.speculation.draft_model import DraftModel
from hf_paged.speculation.drafter import KINDS
from hf_paged.speculation.guide import MARGIN, Ledger, Overhead
from hf_paged.speculation.proposal import Proposal, Verdict
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.suffix import SURE, alone
from hf_paged.speculation.texts import RowDrafting
from hf_paged.speculation.visit_odds import OFTEN, Odds

MOST = 16  # steps at a visit
AHEAD = 512  # tokens that come next in a text that is followed: as many as a visit may take, and more
FAR = 128  # slots that a visit takes at most, about
SIZES = 48  # drafts of one step
NODE = 2e-6  # seconds of a draft outside all forwards
STALE = 12  # visits behind which what steps without drafts take is measured anew, in a burst
CLEAR = 1.25  # a gain with which that can wait, four times as long
ENDING = 4  # one of so many rows may end before a visit does, where nobody waits for its place
LONGEST_REST = 4  # visits that are not made where as many did not pay


class Step(NamedTuple):
    """Rows of a step that had not ended, tokens that it gave, and what became of its drafts."""

    rows: int
    tokens: int
    verdicts: list[tuple[PlanRow, Verdict]]


@dataclass(eq=False)
class Plan:
    """What is to be done at a visit.

    Attributes:
        model: who drafts where texts do not, or None. steps: most of them. ledger: of each.
        soon: as in `Speculator.propose`; None where a draft model is not asked about.
        looked: rows that were looked at in the suffix index.
    """

    speculator: Speculator
    work: Sequence[PlanRow]
    rules: Rules
    rows: list[TextRow]
    steps: int
    ledger: Ledger
    model: DraftModel | None
    soon: int | None
    looked: list[PlanRow]

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
        self.certain = False  # whether all rows of the latest one repeated texts
        self.since = 0  # visits since steps without drafts were made instead
        self._clear = False  # whether the latest one gained much
        self.overhead = Overhead(node=NODE)  # of steps without drafts in bursts, of others in visits
        self._size = 0, 0  # rows and drafts whose costs are known
        self._known: tuple[Ledger, np.ndarray] | None = None

    def serve(self, soon: int) -> bool:
        """Whether there may be something to plan. soon: as in `Speculator.propose`."""
        spec = self.speculator
        if not spec.config.adaptive or spec.config.method not in ("draft", "lookup", "suffix", "auto"):
            return False
        return spec.config.method == "auto" or not (spec.has_drafter and spec.trial.idle(soon))

    def plan(self, work: Sequence[PlanRow], budget: int, waits: bool, soon: int) -> Plan | None:
        """What to do at a visit for rows that each have one token to compute; None: it is to be made step by step.

        Args:
            budget: drafts that a step can take. waits, soon: as in `Speculator.propose`.
        """
        spec, count = self.speculator, len(work)
        if not spec.cost.of(count).knows(count) or spec.config.confidence_threshold or budget <= 0:
            return None
        followed, steps = self._followed(work)
        if not steps:
            return None
        self.certain = len(followed) == count and all(followed.values())  # no row needs a draft model
        model, known = None, {}
        if spec.has_drafter and not self.certain:
            known = self._known_to_model(work, budget) if not spec.trial.idle(soon) else None
            if known is None:
                return None
            model = spec.drafter
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
        rows = [
            self._row(planned, known.get(planned), values.get(planned, 1.0), followed.get(planned)) for planned in work
        ]
        return Plan(spec, work, rules, rows, steps, ledger, model, None if self.certain else soon, list(followed))

    def _known_to_model(self, work: Sequence[PlanRow], budget: int) -> dict[PlanRow, int] | None:
        """Tokens of each row of which the draft model has KV; None where it does not serve, or has whole prompts to
        read."""
        model = self.speculator.drafter
        if type(model) is not DraftModel or model.store is None or model.sizes is not None or not model.ready():
            return None
        few = getattr(model.forward, "few_model", int)()
        if not few or min(few.slots, model.longest) < max(len(planned.row.tokens) for planned in work) + FAR:
            return None
        known = {planned: model.known(planned) for planned in work}
        lag = sum(len(planned.row.tokens) - at for planned, at in known.items())
        return known if lag <= min(few.most, budget) else None

    def _followed(self, work: Sequence[PlanRow]) -> tuple[dict[PlanRow, Followed | None], int]:
        """The texts that rows repeat, of those whose time has come, and steps until the others are to be looked at:
        these are not made at a visit. Looks are paid for as all are."""
        spec, suffix = self.speculator, self.speculator.config.method == "suffix"
        if not suffix and spec.config.method != "auto":
            return {}, MOST
        texts, step, begun = spec.texts, spec.steps + 1, time.perf_counter()
        found = texts.followed(work, step, AHEAD, len(work) // ENDING)
        if found is None or found:
            texts.looked(spec.measured(time.perf_counter() - begun), len(found or (1,)))
        if found is None or (suffix and not any(found.values())):
            return {}, 0
        others = [planned for planned in work if planned not in found]
        return found, min(MOST, texts.next_look(others, step)) if others else MOST

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
            sure=SURE,
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
        ).with_tables(self.odds.texts, self.odds.drafted, seconds, forward)

    @staticmethod
    def _forwards(model: DraftModel, rows: int) -> np.ndarray:
        """Seconds of the draft model's forwards over up to `rows` lines: as measured, or as one line would take."""
        one = model.cost.seconds(1)
        return np.array([0.0, *(max(model.cost.seconds(n), one) for n in range(1, rows + 1))])

    def _row(self, planned: PlanRow, known: int | None, value: float, followed: Followed | None) -> TextRow:
        row, spec = planned.row, self.speculator
        state = RowDrafting.of(row, spec.steps + 1)
        names = "lookup", spec.drafter.name if spec.drafter is not None else "draft", "suffix"
        records = tuple((r.taken, r.expected) for r in map(state.record, names))
        text = state.read_in(row.tokens, row.prompt_length + row.request.max_tokens + NODES)
        length = len(row.tokens)
        known = length if known is None else known
        return TextRow(text, length, 0, row.left, row.stops, known, records, value, followed)

    @property
    def _asks_model(self) -> bool:
        return self.speculator.has_drafter and not self.certain

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
        self.misses = 0 if paid or self._asks_model else min(self.misses + 1, LONGEST_REST)
        return self.misses

    def stale(self) -> bool:
        """Whether it is time to see again what steps without drafts take."""
        return not self._asks_model and self.since >= (4 if self._clear else 1) * STALE

    def looked(self, plan: Plan, steps: Sequence[Step]) -> None:
        """Note for which of the rows that were looked at drafts were worth it."""
        if not plan.looked:
            return
        found = [(planned, verdict) for step in steps for planned, verdict in step.verdicts]
        chosen = {planned for planned, verdict in found if verdict.proposal.source == "suffix"}
        self.speculator.texts.put_off(plan.looked, chosen, self.speculator.steps, len(plan.work))

    def settle(self, plan: Plan, visit: Visit) -> None:
        """The draft model has KV of so many of the row's tokens."""
        for planned, row, known in zip(plan.work, plan.rows, visit.known, strict=True):
            if plan.model is not None and planned.row.sequence is not None:
                plan.model.mark(planned, row.known, known)


def verdict_of(plan: Plan, made: Made, taken: int, ended: bool) -> Verdict | None:
    """What a step made of the drafts of a row that took so many tokens; None where there were none."""
    if not made.tokens:
        return None
    name = plan.model.name if made.source == MODEL else "suffix" if made.source == FOLLOWED else "lookup"
    kinds = made.kinds if name != "suffix" else tuple(alone(kind, SURE)[0] for kind in made.kinds)
    proposal = Proposal(made.tokens, made.parents, kinds, made.odds, name)
    return Verdict(proposal, made.path[: taken - 1], ended)
