"""A draft model's tokens: its own likeliest, under the row's parameters and the row's noise.

A row that samples has its noise keyed by place, so a draft model that draws with the same noise agrees with the target
as often as the two distributions allow (Gumbel coupling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged import filters
from hf_paged.kernels.native_drafts import Chosen
from hf_paged.noise import gumbel
from hf_paged.penalties import adjust
from hf_paged.pipeline import Pipeline, run_pipelines
from hf_paged.sampling import SamplingRow

CANDIDATES = 64  # the draft's likeliest tokens, among which noise decides


@torch.no_grad()
def choose(logits: torch.Tensor, rows: Sequence[SamplingRow], width: int) -> Chosen:
    """The `width` likeliest tokens of each row, and the probabilities of each to come first.

    Args:
        logits: float32 `[rows, vocab]` of the draft model.
        rows: as they are where these tokens would stand.

    Returns:
        token ids and probabilities, largest first. NaN where logits are.
    """
    scores = logits
    if any(row.pipeline is not None and row.pipeline.drafting for row in rows):
        for row in rows:
            row.pipeline = Pipeline(row.pipeline.drafting) if row.pipeline is not None else None
        scores = run_pipelines(logits, rows, [None] * len(rows))
    scores = adjust(scores, rows, owned=scores is not logits)
    width = min(width, scores.shape[1])
    ops = filters.compiled(scores)
    if ops is not None:
        given = filters.draw_arrays([(row.params, row.seed, row.position) for row in rows])
        return ops.likely(scores, width, *given)
    sampled = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not sampled:
        probs, ids = scores.softmax(dim=1).topk(width, dim=1)
    else:
        values, ids = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1)
        at = torch.tensor(sampled, device=scores.device)
        values[at] = _with_noise(values[at], ids[at], [rows[i] for i in sampled])
        whole = scores.logsumexp(dim=1)
        whole[at] = values[at].logsumexp(dim=1)
        probs, place = (values - whole[:, None]).exp().topk(width, dim=1)
        ids = ids.gather(1, place)
    return ids.tolist(), probs.tolist()


def _given(rows: Sequence[SamplingRow], device: torch.device) -> filters.DrawTensors:
    places = [row.position for row in rows]
    return filters.draw_tensors([row.params for row in rows], [row.seed for row in rows], places, device)


def _with_noise(values: torch.Tensor, ids: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Scores of the likeliest tokens, tempered, filtered and with noise: the largest is drawn."""
    given = _given(rows, values.device)
    values = filters.warm(values, given)
    if given.largest_k:
        place = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill((given.top_k > 0) & (place >= given.top_k), -torch.inf)
    if given.any_min_p:
        values = values.masked_fill(values < values[:, :1] + given.min_p.log(), -torch.inf)
    if given.any_top_p:  # of the candidates' own sum: close enough for a draft
        probs = values.softmax(dim=1)
        before = probs.cumsum(dim=1) - probs
        values = values.masked_fill((given.limit >= 0) & (before >= 1 - given.limit), -torch.inf)
    count = values.shape[1]
    spread = (given.seeds.repeat_interleave(count), given.positions.repeat_interleave(count))
    return values + gumbel(*spread, ids.flatten()).view_as(values).float()
