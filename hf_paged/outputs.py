"""What the engine hands back: results of requests, their tokens' log-probabilities, scores, and token events."""

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token at one position, under both distributions that matter.

    raw: log-softmax of the logits as the model gave them.
    processed: log-softmax of the scores after processors, penalties, temperature and filters
        (-inf for a token that these removed).
    rank: 1 + the number of tokens with a strictly larger raw log-probability.
    """

    token_id: int
    raw: float
    processed: float
    rank: int


@dataclass
class CompletionOutput:
    """One completion of a request.

    token_ids: generated ids, the end-of-sequence or stop token included where one ended it.
    logprobs: one dict a generated token (token id -> TokenLogprob; the sampled token first), if asked for.
    cumulative_logprob: sum of the sampled tokens' raw log-probabilities, if log-probabilities were computed.
    finish_reason: None while running. stop_reason: the token id or string that stopped it, if one did.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, TokenLogprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of `time.perf_counter()`; None: not yet.

    preemptions: times that one of its rows gave up its pages. cached_tokens: tokens of its prompt that were not
    computed, because their KV was in the prefix cache. draft_tokens, accepted_tokens: drafts that the model verified,
    and those that were its own tokens. verified_steps: rows' steps in which drafts were verified.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    verified_steps: int = 0


@dataclass
class RequestOutput:
    """All that is known of a request: its prompt, its completions in order of index, its timings.

    prompt_logprobs: one entry a prompt token (None for the first, which nothing predicts), if asked for.
    error: why the request failed; its completions then hold what was generated before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, TokenLogprob] | None] | None = None
    error: Exception | None = None
    metrics: RequestMetrics | None = None
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """What the model makes of a text behind another, as `Engine.score` and `Engine.perplexity` give it.

    token_ids: the tokens scored. logprobs: natural logarithm of each one's probability, log-softmax in float32.
    greedy: whether each is the most probable token at its place. error: why there are no scores.
    """

    token_ids: list[int]
    logprobs: list[float]
    greedy: list[bool]
    error: Exception | None = None

    @property
    def logprob(self) -> float:
        """The text's log-probability: the sum over its tokens; NaN where it failed."""
        return math.nan if self.error is not None else sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give this text."""
        return self.error is None and all(self.greedy)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of its tokens."""
        return math.exp(-self.logprob / len(self.logprobs)) if self.logprobs else math.nan


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of a running request, as `Engine.stream` yields it.

    text: what the token added to the completion's text (may be empty, or end a held-back piece).
    logprob: the sampled token's log-probabilities, if asked for. finish_reason: set on the last event.
    """

    request_id: str
    index: int
    token_id: int
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
