"""From a step's logits to the rows that draw a token from them, and back: parts of the loop around `sample`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite

import numpy as np
import torch

from hf_paged.plan import PlanRow
from hf_paged.request import Row
from hf_paged.sampling import SampleResult, prompt_logprobs
from hf_paged.speculation.proposal import Proposal
from hf_paged.speculation.verify import Drawing


def rows_to_draw(work: Sequence[PlanRow], drafts: dict[PlanRow, Proposal]) -> list[Drawing]:
    """Rows whose last token is computed, and which logits each draws from.

    Where the first row of a request completes the prompt, all its rows draw.
    """
    drawings: list[Drawing] = []
    end = 0
    for planned in work:
        row, begin, end = planned.row, end, end + planned.logits
        if planned in drafts:
            drawings.append(Drawing(row, begin, drafts[planned]))
        elif planned.count == planned.sequence.pending and row.request.scoring is None:
            drawing = row.request.rows if row.index == 0 and not row.output_ids else [row]
            drawings += [Drawing(each, end - 1) for each in drawing]
    return drawings


def note_prompts(work: Sequence[PlanRow], logits: torch.Tensor) -> None:
    """Log-probabilities of prompt tokens, where asked for, from the logits behind the tokens before them."""
    end = 0
    for planned in work:
        begin, end = end, end + planned.logits
        if not planned.row.scores_prompt or planned.row.request.scoring is not None:
            continue
        request, first = planned.row.request, planned.sequence.computed
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        ids = request.prompt_ids[first + 1 : first + planned.count + 1]
        done = len(request.prompt_logprobs) - 1 - first  # a preempted prompt is computed again: some are known
        if done < len(ids):
            own = logits[begin + done : begin + len(ids)]
            next_ids = torch.tensor(ids[done:], device=logits.device)
            request.prompt_logprobs += prompt_logprobs(own, next_ids, request.params.prompt_logprobs)


def all_finite(logits: torch.Tensor) -> bool:
    """Whether all of them are, by one look at their sum; False also where one is -inf."""
    if logits.device.type != "cpu" or logits.requires_grad or logits.dtype != torch.float32:
        return isfinite(float(logits.sum()))
    with np.errstate(all="ignore"):
        return isfinite(logits.numpy().sum())  # a few lines are summed sooner than torch is called


def append_drawn(row: Row, sampled: SampleResult, i: int) -> None:
    """Append entry `i` of what was drawn to `row`, with all that it asked to keep."""
    token = sampled.tokens[i]
    row.append(token if row.hooks.replace is None else row.hooks.replace(row, token))
    if sampled.logprobs is not None and sampled.logprobs[i] is not None:
        row.logprobs.append(sampled.logprobs[i])
    if row.hooks.keep_logits:
        row.logits.append(sampled.logits[i])
    if row.hooks.keep_scores:
        row.scores.append(sampled.scores[i])
    metrics = row.request.metrics
    if metrics.first_token_time is None:
        metrics.first_token_time = time.perf_counter()
