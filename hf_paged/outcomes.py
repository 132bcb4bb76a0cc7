"""What becomes of rows behind a forward: they take a token, end, fail, or are computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.drafting import Drafting
from hf_paged.drawing import append_drawn
from hf_paged.finish import check_finished
from hf_paged.request import Request, Row
from hf_paged.roster import Roster
from hf_paged.sampling import SampleResult
from hf_paged.speculation.verify import Drawing
from hf_paged.stats import Optimum
from hf_paged.text import Decode


@dataclass(eq=False)
class StepResult:
    """What a step gave: tokens `ids` of `rows`, in their order, and the requests that ended.

    Two lists, not one of pairs: thousands of pairs a step would keep Python's garbage collector busy, which looks at a
    whole model's objects for them.
    """

    rows: list[Row] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)

    @property
    def tokens(self) -> list[tuple[Row, int]]:
        """The rows that got a token, and the tokens."""
        return list(zip(self.rows, self.ids, strict=True))


class Outcomes:
    """Tells everybody who must know what became of a row.

    Args:
        decode: token ids → text, for stop strings.
        optimum: is told of rows that end, if there is one.
    """

    def __init__(self, roster: Roster, drafting: Drafting, decode: Decode | None, optimum: Optimum | None) -> None:
        self.roster, self.drafting, self.decode, self.optimum = roster, drafting, decode, optimum

    def take(self, result: StepResult, row: Row, sampled: SampleResult, i: int) -> bool:
        """Append the token that was drawn for `row`; whether it goes on. An error ends the request alone."""
        if row.finish_reason:
            return False
        if sampled.errors[i] is not None:
            self.roster.end(row.request, "error", sampled.errors[i])
            return False
        before = len(row.output_ids)
        try:
            append_drawn(row, sampled, i)
            finished = check_finished(row, self.decode)
        except Exception as error:
            self.roster.end(row.request, "error", error)
            return False
        except BaseException:
            row.shorten(before)
            raise
        result.rows.append(row)
        result.ids.append(row.tokens[-1])
        return not finished

    def finish(self, row: Row) -> None:
        """End a row that has a finish reason; an error of its door ends the request alone."""
        try:
            if row.hooks.closing is not None:
                row.hooks.closing(row)
        except Exception as error:
            row.request.error = error
            self.roster.end(row.request, "error", error)
            return
        if self.optimum is not None:
            self.optimum.finish(row)
        self.drafting.ended(row)
        self.roster.finish(row)

    def finish_scored(self, row: Row, error: Exception | None) -> None:
        """End a row that has all its scores, or fails."""
        if error is not None:
            self.roster.end(row.request, "error", error)
            return
        row.finish_reason = "scored"
        self.finish(row)

    def set_aside(self, drawings: Sequence[Drawing], logits: torch.Tensor) -> list[Drawing]:
        """Of rows with drafts those whose last token has numbers that are not finite are computed again, before others
        can share them; the rest."""
        spoilt = {d for d in drawings if d.proposal is not None and not logits[d.line].amax().isfinite()}
        for drawing in spoilt:
            self.compute_again(drawing.row)
        return [drawing for drawing in drawings if drawing not in spoilt]

    def compute_again(self, row: Row) -> None:
        """A draft whose numbers are not finite may spoil those of tokens beside it: the request goes on without."""
        self.drafting.ended(row)
        row.request.speculator = None
        if row.sequence is not None:
            self.roster.preempt(row, good=False)
