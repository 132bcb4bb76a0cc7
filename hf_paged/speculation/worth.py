"""What a token of a row is worth where nobody waits for a row's place: see `Ledger.values`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_paged.plan import PlanRow
from hf_paged.request import Row
from hf_paged.speculation.guide import Ledger
from hf_paged.speculation.texts import RowDrafting

PACED = 8  # steps of a token each that a row is taken to have made before its first
OFTEN = 8  # steps between two looks


class Worths:
    """What tokens of rows are worth, over what one is on average; that changes slowly."""

    def __init__(self) -> None:
        self._rows = self._since = 0

    def of(self, rows: Sequence[PlanRow], asked: Iterable[PlanRow], ledger: Ledger, step: int) -> dict[PlanRow, float]:
        """For those of `rows` that are asked about; 1 for all where it is not known when each row ends."""
        same = self._rows == len(rows) and None not in [RowDrafting.of(p.row, step).worth for p in asked]
        if not same or step >= self._since + OFTEN:
            by_length = all(_ends_by_length(planned.row) for planned in rows)
            steps = [_steps_left(planned.row, step) for planned in rows] if by_length else []
            worths = ledger.values(steps) if by_length else [1.0] * len(rows)
            for planned, worth in zip(rows, worths, strict=True):  # on the row, which nobody keeps for it
                RowDrafting.of(planned.row, step).worth = worth
            self._rows, self._since = len(rows), step
        return {planned: RowDrafting.of(planned.row, step).worth for planned in asked}


def _steps_left(row: Row, step: int) -> float:
    """Steps until a row ends, if it goes on as it did so far."""
    pace = (len(row.output_ids) + PACED) / (step - RowDrafting.of(row, step).begun + PACED)
    return row.left / pace


def _ends_by_length(row: Row) -> bool:
    """Whether it is known how many tokens a row will have."""
    params = row.request.params
    if params.min_tokens >= row.request.max_tokens:
        return True
    return not (row.sampling.eos_ids or params.stop_token_ids or params.stop or row.hooks.stop)
