"""Logits to tokens: a token depends on (logits, parameters, seed, position) and on nothing else.

Order for a row: the model's logits -> its pipeline of transformers processors -> logit_bias, bad words,
min_tokens mask, repetition, frequency and presence penalties -> temperature -> top_k -> top_p -> min_p -> the
largest of score + keyed Gumbel noise (`hf_paged.noise`). A greedy row takes the largest before temperature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_paged import filters
from hf_paged.logprobs import prompt_logprobs, token_logprobs
from hf_paged.outputs import TokenLogprob
from hf_paged.params import SamplingParams
from hf_paged.penalties import adjust, is_touched
from hf_paged.pipeline import Pipeline, run_pipelines

__all__ = ["Pipeline", "SampleResult", "SamplingError", "SamplingRow", "prompt_logprobs", "sample"]

FEW_SCORES = 1 << 17  # on a CPU numpy looks through so many before torch has begun


class SamplingError(RuntimeError):
    """No token can be drawn from a row's logits or scores."""


class NotFinite(SamplingError):
    """They are NaN or infinite."""


@dataclass(slots=True)
class SamplingRow:
    """One token to draw. Only read here; may be kept and updated from step to step.

    seed: any int. position: index of the token to draw in the whole sequence, prompt included. prompt_ids,
    output_ids: what comes before it. eos_ids: ends that min_tokens masks. bad_word_ids: bad words, tokenised.
    keep_logits, keep_scores: hand back the row's raw logits, or its scores just before the noise.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    pipeline: Pipeline | None = None
    eos_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    keep_logits: bool = False
    keep_scores: bool = False

    def ahead(self, tokens: Sequence[int]) -> "SamplingRow":
        """The same row with `tokens` behind its output: what it draws after them."""
        # A list is made only for those who look at it.
        output = self.output_ids if not is_touched(self) else [*self.output_ids, *tokens]
        place = self.position + len(tokens)
        rest = (self.pipeline, self.eos_ids, self.bad_word_ids, self.keep_logits, self.keep_scores)
        return SamplingRow(self.params, self.seed, place, self.prompt_ids, output, *rest)


@dataclass(slots=True)
class SampleResult:
    """Results in order of the rows. A row that failed has token -1, its exception in errors, and no extras.

    logprobs, logits, scores: None if no row asked for any, else an entry a row: None if it did not ask.
    An entry of logits or scores is float32 [V], of the caller's own.
    """

    tokens: list[int]
    errors: list[Exception | None]
    logprobs: list[dict[int, TokenLogprob] | None] | None = None
    logits: list[torch.Tensor | None] | None = None
    scores: list[torch.Tensor | None] | None = None


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> SampleResult:
    """Draw one token for each row of logits: float32 [S, V], left as they are.

    What is wrong with one row (NaN or infinite logits, a processor that raises or returns another shape, no
    token left) is that row's error; KeyboardInterrupt passes. A batched processor fails for its whole group.
    Raises ValueError if `logits` is not [len(rows), V].
    """
    if logits.dim() != 2 or len(logits) != len(rows) or not logits.shape[1]:
        raise ValueError(f"logits has shape {list(logits.shape)}: must be [{len(rows)}, V], one row for each token")
    if logits.requires_grad or logits.dtype != torch.float32:
        logits = logits.detach().float()
    tokens = [-1] * len(rows)
    errors: list[Exception | None] = [None] * len(rows)
    if all(map(_is_plain_greedy, rows)):
        _take_largest(logits, range(len(rows)), tokens, errors, raw=True)
        return SampleResult(tokens, errors)
    if all(map(_is_plain_draw, rows)):
        drawn = filters.draw_at_once(logits, [(row.params, row.seed, row.position) for row in rows])
        if drawn is not None:
            return SampleResult(drawn, errors)
    return _sample_in_parts(logits, rows, tokens, errors)


@torch.no_grad()
def _sample_in_parts(
    logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: list[int], errors: list[Exception | None]
) -> SampleResult:
    """The same, step by step."""
    _find_raw_errors(logits, errors)
    scores = run_pipelines(logits, rows, errors)
    scores = adjust(scores, rows, owned=scores is not logits)
    processed = _choose(scores, rows, tokens, errors)
    return _with_extras(SampleResult(tokens, errors), logits, rows, processed)


def _is_plain_greedy(row: SamplingRow) -> bool:
    """Nothing but the largest logit is asked for. (Called for every row of every step: no calls inside.)"""
    params = row.params
    return (
        params.bare
        and row.pipeline is None
        and not row.bad_word_ids
        and len(row.output_ids) >= params.min_tokens
        and not (row.keep_logits or row.keep_scores)
    )


def _is_plain_draw(row: SamplingRow) -> bool:
    """Nothing but a draw from the logits, filtered perhaps, is asked for."""
    params = row.params
    return (
        not params.greedy
        and params.plain
        and params.logprobs is None
        and row.pipeline is None
        and not row.bad_word_ids
        and len(row.output_ids) >= params.min_tokens
        and not (row.keep_logits or row.keep_scores)
    )


def _wants_scores(row: SamplingRow) -> bool:
    return row.keep_scores or row.params.logprobs is not None


def _find_raw_errors(logits: torch.Tensor, errors: list[Exception | None]) -> None:
    for i, top in enumerate(logits.amax(dim=1).tolist()):
        if not math.isfinite(top):
            errors[i] = _no_token(top, "the model's logits")


def _no_token(top: float, what: str) -> SamplingError:
    """Why nothing can be drawn from numbers whose largest is `top`, which is not finite."""
    if math.isnan(top):
        return NotFinite(f"{what} hold NaN")
    if top > 0:
        return NotFinite(f"{what} hold +inf")
    return SamplingError(f"no token is allowed: {what} are all -inf")


def drawn_errors(tops: Sequence[float]) -> list[Exception | None]:
    """What is wrong with rows, by the largest of each one's logits over its temperature."""
    return [None if math.isfinite(top) else _no_token(top, "the model's logits") for top in tops]


def _take_largest(
    scores: torch.Tensor,
    members: Sequence[int],
    tokens: list[int],
    errors: list[Exception | None],
    raw: bool = False,
) -> None:
    """Greedy: take the largest of scores float32 [n, V] for the rows `members`. The lowest id wins a tie.

    A processor may force a token by +inf, as in transformers; a model's raw logits should not hold it.
    """
    for i, top, token in zip(members, *_largest(scores), strict=True):
        if math.isfinite(top) or (top > 0 and not raw):
            tokens[i] = token
        else:
            errors[i] = _no_token(top, "the model's logits" if raw else "the processed scores")


def _largest(scores: torch.Tensor) -> tuple[list[float], list[int]]:
    """The largest of each row, NaN where there is one, and the first place where it stands."""
    if scores.device.type == "cpu" and scores.numel() <= FEW_SCORES:
        array = (scores.detach() if scores.requires_grad else scores).numpy()  # a processor may give its parameter
        ids = array.argmax(axis=1).tolist()
        return [array.item(row, token) for row, token in enumerate(ids)], ids
    tops, ids = scores.max(dim=1)
    return tops.tolist(), ids.tolist()


def _choose(
    scores: torch.Tensor, rows: Sequence[SamplingRow], tokens: list[int], errors: list[Exception | None]
) -> dict[int, torch.Tensor]:
    """Fill in tokens (and errors) from scores [S, V]. Returns the final scores of the rows that want them."""
    groups: dict[tuple[bool, bool, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if errors[i] is None:
            kind = (row.params.greedy, row.params.filtered, row.params.filtered and _wants_scores(row))
            groups.setdefault(kind, []).append(i)
    processed: dict[int, torch.Tensor] = {}
    for (greedy, narrowed, shown), members in groups.items():
        part = scores if len(members) == len(rows) else scores[members]
        if greedy:
            _take_largest(part, members, tokens, errors)
        else:
            members, part = _draw(part, members, rows, tokens, errors, narrowed, shown)
        processed.update((i, part[place]) for place, i in enumerate(members) if _wants_scores(rows[i]))
    return processed


def _draw(
    part: torch.Tensor,
    members: list[int],
    rows: Sequence[SamplingRow],
    tokens: list[int],
    errors: list[Exception | None],
    narrowed: bool,
    shown: bool,
) -> tuple[list[int], torch.Tensor]:
    """Draw for the rows `members` from their scores `part` [n, V].

    narrowed: they have filters. shown: final scores are wanted, so filters are applied to whole vocabularies.
    Returns the rows that a token could be drawn for, and their final scores.
    """
    chosen = [rows[i] for i in members]
    given = filters.draw_tensors(
        [row.params for row in chosen],
        [row.seed for row in chosen],
        [row.position for row in chosen],
        part.device,
    )
    ops = filters.drawing_ops(part)
    drawn = None
    if ops is not None:
        drawn, tops = ops.draw(part, *given.arrays())
    if drawn is None or any(map(_wants_scores, chosen)):
        part = filters.warm(part, given)
    if drawn is None:
        tops = part.amax(dim=1).tolist()
    good = [place for place, top in enumerate(tops) if math.isfinite(top)]
    if len(good) < len(members):
        for place, top in enumerate(tops):
            if not math.isfinite(top):
                errors[members[place]] = _no_token(top, "the processed scores")
        members, part = [members[place] for place in good], part[good]
        given = given.pick(torch.tensor(good, dtype=torch.int64, device=part.device))
        drawn = drawn and [drawn[place] for place in good]
    if not members:
        return members, part
    if shown:
        part = filters.filtered(part, given)
    if drawn is None:
        drawn = (filters.draw(part, given) if narrowed and not shown else filters.draw_dense(part, given)).tolist()
    for i, token in zip(members, drawn, strict=True):
        tokens[i] = token
    return members, part


def _with_extras(
    result: SampleResult,
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    processed: dict[int, torch.Tensor],
) -> SampleResult:
    """Add what rows asked for: log-probabilities, raw logits, final scores."""
    fine = [i for i, error in enumerate(result.errors) if error is None]
    if any(row.keep_logits for row in rows):
        result.logits = [None] * len(rows)
        for i in fine:
            if rows[i].keep_logits:
                result.logits[i] = logits[i].clone()
    if any(row.keep_scores for row in rows):
        result.scores = [None] * len(rows)
        for i in fine:
            if rows[i].keep_scores:
                result.scores[i] = processed[i].clone()
    asked: dict[int, list[int]] = {}
    for i in fine:
        if rows[i].params.logprobs is not None:
            asked.setdefault(rows[i].params.logprobs, []).append(i)  # by k: topk of another k may order ties otherwise
    if any(row.params.logprobs is not None for row in rows):
        result.logprobs = [None] * len(rows)
    for k, members in asked.items():
        scores = torch.stack([processed[i] for i in members])
        for i, found in zip(
            members,
            token_logprobs(logits[members], scores, [result.tokens[i] for i in members], k),
            strict=True,
        ):
            result.logprobs[i] = found
    return result
