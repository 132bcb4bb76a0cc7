"""A request and its rows, as the engine keeps them while they run."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hf_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from hf_paged.params import SamplingParams
from hf_paged.sampling import Pipeline, SamplingRow
from hf_paged.scoring import Scoring
from hf_paged.seeds import mix_seed
from hf_paged.sequence import Sequence
from hf_paged.text import IncrementalText

if TYPE_CHECKING:
    from hf_paged.speculation.speculator import Speculator


@dataclass(frozen=True)
class RowHooks:
    """What a front door adds to the rows of a request.

    Attributes:
        pipeline: processors of the scores, before those of `SamplingParams`.
        stop: called after each token with the row; returns why it stops (a token id, a string or True) or None.
        replace: called with the row and the token drawn for it; returns the token to append.
        closing: called when the row is finished, before its pages are released.
        keep_logits, keep_scores: keep the raw logits, or the processed scores, of every token.
    """

    pipeline: Pipeline | None = None
    stop: Callable[[Row], int | str | bool | None] | None = None
    replace: Callable[[Row, int], int] | None = None
    closing: Callable[[Row], None] | None = None
    keep_logits: bool = False
    keep_scores: bool = False


@dataclass(eq=False)
class Row:
    """One completion in the making.

    Attributes:
        tokens: prompt and output; the last one's KV is not stored yet.
        sequence: its pages while it runs, None while it waits.
        finish_reason: None while it is not finished.
        text: decoded so far, where stop strings are looked for.
        shared: whether its KV may be shared through the prefix cache.
        text_length: characters of the output's text before the stop string that ended it.
        drafting: whatever its request's speculator keeps of it.
    """

    request: Request
    index: int
    tokens: list[int]
    sampling: SamplingRow
    hooks: RowHooks
    shared: bool = False
    sequence: Sequence | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: IncrementalText | None = None
    text_length: int | None = None
    logprobs: list[dict[int, TokenLogprob]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    drafting: Any = field(default=None, repr=False)

    @property
    def reuses(self) -> bool:
        """Whether it may begin with KV that others computed: not where its prompt's own logits are asked for."""
        return self.shared and (self.request.params.prompt_logprobs is None or bool(self.index or self.output_ids))

    @property
    def reusable(self) -> int:
        """Tokens, from the first, whose KV others may have computed: behind the next ones logits are needed."""
        scoring = self.request.scoring
        return (len(self.tokens) if scoring is None else scoring.start) - 1

    @property
    def proven(self) -> bool:
        """Whether its KV is known to be good, since its logits were."""
        scoring = self.request.scoring
        return bool(self.output_ids) if scoring is None else not scoring.left and scoring.spoilt() is None

    @property
    def scores_prompt(self) -> bool:
        """Whether logits behind tokens of its prompt are needed, which it is about to compute."""
        request = self.request
        if request.scoring is not None:
            return True
        return request.params.prompt_logprobs is not None and self.index == 0 and not self.output_ids

    def logits_of(self, begin: int, count: int) -> int:
        """Behind how many of its `count` tokens from `begin` on logits are needed: the last ones."""
        if self.request.scoring is not None:
            return min(count, max(begin + count - self.reusable, 0))
        return count if self.scores_prompt else int(begin + count == len(self.tokens))

    @property
    def salt(self) -> str | None:
        """Who it shares KV with: rows of the same salt."""
        return self.request.params.cache_salt

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """Generated token ids (the list that grows, not a copy)."""
        return self.sampling.output_ids

    @property
    def left(self) -> int:
        """Tokens that it may have yet."""
        return self.request.max_tokens - len(self.output_ids)

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids of tokens that end it."""
        return (*self.sampling.eos_ids, *self.request.params.stop_token_ids)

    @property
    def order(self) -> tuple[float, int, int]:
        """Who goes first: priority, then arrival."""
        return (self.request.params.priority, self.request.number, self.index)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.sampling.output_ids.append(token)
        self.sampling.position = len(self.tokens)

    def shorten(self, length: int) -> None:
        """Forget the output behind its first `length` tokens: they will be drawn again."""
        for kept in (self.output_ids, self.logprobs, self.logits, self.scores):
            del kept[length:]
        del self.tokens[self.prompt_length + length :]
        self.sampling.position = len(self.tokens)
        self.finish_reason = self.stop_reason = self.text = self.text_length = None

    def output(self, text: str) -> CompletionOutput:
        """What the caller gets of this row."""
        asked = self.request.params.logprobs is not None
        total = None
        if self.logprobs:
            total = sum(entry[token].raw for entry, token in zip(self.logprobs, self.output_ids, strict=True))
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(self.output_ids),
            logprobs=self.logprobs if asked else None,
            cumulative_logprob=total,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


@dataclass(eq=False)
class Request:
    """A prompt and the rows that continue it. `ended`: all of them are finished, or it was cancelled or failed.

    `ending` says why it ends before its rows do, once that has begun. `on_end` is called with the request when it ends.
    `speculator` drafts for it. With `scoring` it generates nothing.
    """

    request_id: str
    number: int
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    metrics: RequestMetrics
    rows: list[Row] = field(default_factory=list)
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None
    error: Exception | None = None
    ending: str | None = None
    ended: bool = False
    on_end: Callable[[Request], None] | None = None
    speculator: Speculator | None = None
    scoring: Scoring | None = None

    def add_rows(
        self,
        seed: int,
        hooks: Rows[RowHooks] | None,
        eos_ids: tuple[int, ...],
        bad_word_ids: tuple[tuple[int, ...], ...] = (),
        shared: bool = False,
    ) -> None:
        """Make its `params.num_samples` rows; row `i` draws with `mix_seed(seed, i)`, row 0 with `seed` itself."""
        params, own = self.params, tuple((processor, False) for processor in self.params.logits_processors)
        if params.num_samples > params.n and params.logprobs is None:
            params = replace(params, logprobs=0)  # the best are chosen by their log-probability
        for index in range(params.num_samples):
            hook = hooks[index] if hooks else RowHooks()
            given = hook.pipeline or Pipeline(())
            pipeline = Pipeline((*given.steps, *own), given.drafting) if own else hook.pipeline
            sampling = SamplingRow(
                params=params,
                seed=mix_seed(seed, index) if index else seed,
                position=len(self.prompt_ids),
                prompt_ids=self.prompt_ids,
                output_ids=[],
                pipeline=pipeline,
                eos_ids=() if params.ignore_eos else eos_ids,
                bad_word_ids=bad_word_ids,
                keep_logits=hook.keep_logits,
                keep_scores=hook.keep_scores,
            )
            self.rows.append(Row(self, index, list(self.prompt_ids), sampling, hook, shared))

    @property
    def finished(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    def output(self, text_of: Callable[[Row], str]) -> RequestOutput:
        """The result: with `best_of`, the n rows of highest cumulative log-probability, else all, in order."""
        outputs = [row.output(text_of(row)) for row in self.rows]
        if self.params.num_samples > self.params.n:
            outputs.sort(key=lambda o: -(o.cumulative_logprob if o.cumulative_logprob is not None else -float("inf")))
            outputs = outputs[: self.params.n]
            for index, output in enumerate(outputs):
                output.index = index
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=outputs,
            prompt_logprobs=self.prompt_logprobs,
            error=self.error,
            metrics=self.metrics,
            finished=self.finished,
        )
