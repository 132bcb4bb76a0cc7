"""Decode steps on a CPU, several at one visit of Python, in one compiled call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hf_paged.filters import draw_arrays
from hf_paged.integrations.inspect import PagedForward
from hf_paged.kernels.native_blocks import FREQUENCIES, FewModel
from hf_paged.kernels.native_steps import steps_op
from hf_paged.kernels.native_verified import Visit, verified_op
from hf_paged.plan import PlanRow, build_plan, page_table
from hf_paged.speculation.visit import Plan

# Steps at one visit: as many as take this long; FIRST where that is not known. A request that arrives waits so long at
# most, and so does Ctrl-C.
SECONDS, FIRST, MOST = 0.05, 2, 16


class FewStepper:
    """Runs bursts of decode steps; see `hf_paged.burst.Stepper`.

    Args:
        forward: of the model.
        page_size: of its KV.
    """

    def __init__(self, forward: PagedForward, page_size: int) -> None:
        self.forward, self.page_size = forward, page_size
        self.op, self.verified = steps_op(), verified_op(page_size)
        self._paces: dict[int, float] = {}  # seconds of a step, by rows as powers of two

    @property
    def most(self) -> int:
        """Steps at once; 0 where the model is none for this."""
        model = self.forward.few_model() if self.op is not None else None
        if model is None or not model.ends[FREQUENCIES]:
            return 0
        return self._within(min(self._paces.values(), default=None))

    def _allowed(self, rows: int) -> int:
        """Steps of so many rows at once."""
        return self._within(self._paces.get(rows.bit_length()))

    @staticmethod
    def _within(pace: float | None) -> int:
        """Steps at once, where one takes so long."""
        return FIRST if pace is None else min(max(int(SECONDS / pace), 1), MOST)

    def _note(self, rows: int, seconds: Sequence[float]) -> None:
        if len(seconds):
            self._paces[rows.bit_length()] = float(min(seconds))

    @property
    def lines(self) -> int:
        """Tokens, drafts among them, of one step with drafts."""
        model = self.forward.few_model()
        return 0 if model is None or self.verified is None else model.most

    @property
    def slots(self) -> int:
        """Slots of a row up to which no window hides any."""
        model = self.forward.few_model()
        return 0 if model is None else model.slots

    def run(self, rows: Sequence[PlanRow], steps: int) -> Iterator[tuple[list[int], list[float]]] | None:
        """See `hf_paged.burst.Stepper`: no step follows one in which a row ends."""
        model = self.forward.few_model()
        longest = max(planned.sequence.computed for planned in rows) + steps
        if len(rows) > model.most or longest > model.slots:
            return None
        return self._steps(model, rows, min(steps, self._allowed(len(rows))))

    def _steps(self, model: FewModel, rows: Sequence[PlanRow], steps: int) -> Iterator[tuple[list[int], list[float]]]:
        plan = build_plan(rows, self.page_size)
        each = [planned.row for planned in rows]
        parameters = draw_arrays([(row.sampling.params, row.sampling.seed, row.sampling.position) for row in each])
        left, stops = [row.left for row in each], [row.stops for row in each]
        made = self.op(model, plan.token_ids, plan.positions, plan.rows, parameters, left, stops, steps)
        self._note(len(rows), made[2])
        yield from zip(made[0].tolist(), made[1].tolist(), strict=True)

    def verify(self, plan: Plan) -> Visit | None:
        """See `hf_paged.burst.Stepper`."""
        models = [self.forward.few_model()]
        if plan.model is not None:
            few_model = getattr(plan.model.forward, "few_model", None)
            models.append(few_model() if few_model is not None else None)
        longest = max(row.slots for row in plan.rows)
        lag = sum(row.length - row.known for row in plan.rows)
        lines = len(plan.rows) + plan.rules.most, lag
        for model, most in zip(models, lines, strict=False):
            if model is None or not model.ends[FREQUENCIES] or most > model.most or longest > model.slots:
                return None
        target, draft = (*models, None)[:2]
        each = [planned.row.sampling for planned in plan.work]
        parameters = draw_arrays([(row.params, row.seed, row.position) for row in each])
        table = page_table([planned.sequence for planned in plan.work])
        steps = min(plan.steps, self._allowed(len(plan.rows)))
        visit = self.verified((target, draft), plan.rows, plan.rules, parameters, table, steps)
        self._note(len(plan.rows), [sum(step) for step in visit.seconds])
        return visit

    def forget(self, known: object = None) -> None:
        """Nothing of the model is kept here."""
