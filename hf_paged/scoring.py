"""Scoring: what a model makes of tokens that are given. A request that scores generates nothing.

As with SGLang's `logprob_start_len`, logits are computed from one place on only: what lies before it may come from the
prefix cache, and a step never holds more rows of logits than it may (`Limits.max_logits`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hf_paged.logprobs import chosen_logprobs

if TYPE_CHECKING:
    from hf_paged.plan import PlanRow
    from hf_paged.request import Row


class ScoringError(RuntimeError):
    """The model's logits are of no use."""


@dataclass(eq=False)
class Scoring:
    """What a request scores: its tokens from `start` on, and others that might stand behind its last one.

    Attributes:
        start: place of the first token that is scored, 1 to the number of tokens.
        ends: token ids, at least one, each scored as the one behind the last token. They cost one row of logits.
        logprobs: natural logarithm of each scored token's probability: those of the request, then `ends`.
        greedy: whether each is the most probable one at its place.
        left: scored tokens whose logits are not known yet.
    """

    start: int
    ends: tuple[int, ...]
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    left: int = -1

    def begin(self, length: int) -> None:
        """Of a request of `length` tokens nothing is known yet."""
        self.left = length - self.start + len(self.ends)
        self.logprobs, self.greedy = [math.nan] * self.left, [False] * self.left

    def take(self, place: int, logprobs: list[float], greedy: list[bool]) -> None:
        """Note scores from number `place` on. A row that was preempted may bring some again."""
        end = place + len(logprobs)
        self.logprobs[place:end], self.greedy[place:end] = logprobs, greedy
        self.left = len(self.logprobs) - end

    def spoilt(self) -> int | None:
        """Number of the first score so far that is NaN."""
        known = len(self.logprobs) - self.left
        return next((i for i, logprob in enumerate(self.logprobs[:known]) if math.isnan(logprob)), None)


def note_scores(work: Iterable[PlanRow], logits: torch.Tensor) -> list[tuple[Row, ScoringError | None]]:
    """Keep what rows of a step score.

    Args:
        logits: float32 `[n, vocab]`, those of the rows one after another.
    Returns:
        rows that are done, and those that failed with their error.
    """
    lines: list[int] = []
    ids: list[int] = []
    parts: list[tuple[PlanRow, int, int]] = []
    end = 0
    for planned in work:
        begin, end = end, end + planned.logits
        scoring = planned.row.request.scoring
        if scoring is None or not planned.logits:
            continue
        stop = planned.sequence.computed + planned.count
        first = stop - planned.logits + 1  # what follows the first of these logits
        wanted = planned.row.tokens[first : stop + 1]
        own = [*range(begin, begin + len(wanted))]
        if stop == len(planned.row.tokens):
            wanted += scoring.ends
            own += [end - 1] * len(scoring.ends)
        parts.append((planned, first - scoring.start, len(wanted)))
        lines += own
        ids += wanted
    if not parts:
        return []
    logprobs, greedy = chosen_logprobs(logits, lines, ids)
    return _share_out(parts, logprobs, greedy)


def _share_out(
    parts: list[tuple[PlanRow, int, int]], logprobs: list[float], greedy: list[bool]
) -> list[tuple[Row, ScoringError | None]]:
    """Give each row its part of the scores."""
    ended: list[tuple[Row, ScoringError | None]] = []
    at = 0
    for planned, place, count in parts:
        scoring, own = planned.row.request.scoring, logprobs[at : at + count]
        scoring.take(place, own, greedy[at : at + count])
        at += count
        # All so far: an interrupt may have come between a score and the end that it asks for.
        if (spoilt := scoring.spoilt()) is not None:
            where = min(scoring.start + spoilt, len(planned.row.tokens)) - 1
            ended.append((planned.row, ScoringError(f"the logits behind token {where} are NaN or infinite")))
        elif not scoring.left:
            ended.append((planned.row, None))
    return ended
