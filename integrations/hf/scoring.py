"""Scoring by an engine: which texts share a request, and how they get their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from hf_paged.admission import checked_prompt
from hf_paged.config import is_int
from hf_paged.integrations.prompts import plain
from hf_paged.integrations.scoring_texts import Encoder, Pair, encode_pairs, is_prompt, windows
from hf_paged.outputs import Score
from hf_paged.params import SamplingParams
from hf_paged.request import Request
from hf_paged.scoring import Scoring, ScoringError

if TYPE_CHECKING:
    from hf_paged.integrations.engine import Engine


def cut_left(pair: Pair, most: int) -> Pair:
    """The context cut at its beginning, so that `most` tokens go before the last one that is scored."""
    over = len(pair.context) + len(pair.continuation) - 1 - most
    if over <= 0 or over >= len(pair.context):
        return pair
    return Pair(pair.context[over:], pair.continuation, pair.shared, pair.error)


def failed(pair: Pair, error: Exception) -> Score:
    return Score(list(pair.continuation), [], [], error)


class ScoringRun:
    """Pairs on their way through an engine. Iterate over it: index and score of each pair, in order of their end.

    Args:
        cache_salt: share KV with requests of the same salt only.
    """

    def __init__(self, engine: Engine, pairs: Sequence[Pair], cache_salt: str | None = None) -> None:
        self.engine, self.pairs, self.cache_salt = engine, pairs, cache_salt
        self._refused: list[tuple[int, Score]] = []
        self._pending: dict[Request, list[int]] = {}
        self._ended: list[Request] = []

    def __iter__(self) -> Iterator[tuple[int, Score]]:
        try:
            self._submit()
            yield from self._refused
            while self._pending:
                if not self._ended:
                    self.engine.advance(list(self._pending))
                yield from self._take()
        finally:
            self.engine.drop(list(self._pending))

    def _submit(self) -> None:
        shared = SamplingParams(temperature=0.0, max_tokens=1, cache_salt=self.cache_salt)
        alone = SamplingParams(temperature=0.0, max_tokens=1, prefix_caching=False)
        with self.engine.lock:
            self.engine.begin()
            for key, members in self._groups().items():
                tokens, start, share = key
                scoring = Scoring(start, tuple(self.pairs[i].continuation[-1] for i in members))
                try:
                    request = self.engine.core.submit_scoring(tokens, scoring, shared if share else alone)
                except ValueError as error:
                    self._refused += [(index, failed(self.pairs[index], error)) for index in members]
                    continue
                request.on_end = self._ended.append
                self._pending[request] = members
            self.engine.core.arrange(list(self._pending))

    def _groups(self) -> dict[tuple, list[int]]:
        """Pairs that differ in their last token only: one row of logits serves them. Those that are refused are not
        among them."""
        groups: dict[tuple, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            try:
                if pair.error is not None:
                    raise pair.error
                if not len(pair.continuation):
                    raise ValueError("the continuation is empty: at least one token is needed")
                checked_prompt(pair.continuation, self.engine.core.capacity)
            except ValueError as error:
                self._refused.append((index, failed(pair, error)))
                continue
            key = (*pair.context, *pair.continuation[:-1]), len(pair.context), pair.shared
            groups.setdefault(key, []).append(index)
        return groups

    def _take(self) -> Iterator[tuple[int, Score]]:
        """Scores of requests that have ended."""
        while self._ended:
            request = self._ended.pop()
            for number, index in enumerate(self._pending.pop(request)):
                yield index, self._result(request, number, self.pairs[index])

    def _result(self, request: Request, number: int, pair: Pair) -> Score:
        scoring = request.scoring
        if request.error is not None or scoring.left:
            return failed(pair, request.error or ScoringError("the request was cancelled"))
        inner, last = len(pair.continuation) - 1, len(pair.continuation) - 1 + number
        logprobs = [*scoring.logprobs[:inner], scoring.logprobs[last]]
        greedy = [*scoring.greedy[:inner], scoring.greedy[last]]
        return Score(list(pair.continuation), logprobs, greedy)


def score_pairs(
    engine: Engine,
    pairs: Sequence[Pair],
    *,
    truncate: bool = False,
    cache_salt: str | None = None,
    use_tqdm: bool = False,
    raise_errors: bool = False,
) -> list[Score]:
    """Scores of pairs, in their order. See `Engine.score`."""
    if truncate:
        pairs = [cut_left(pair, engine.core.capacity.scorable) for pair in pairs]
    scores: list[Score | None] = [None] * len(pairs)
    bar = None
    if use_tqdm:
        from tqdm.auto import tqdm

        bar = tqdm(total=len(pairs), unit="score")
    with closing(iter(ScoringRun(engine, pairs, cache_salt))) as run, closing(bar) if use_tqdm else nullcontext():
        for index, score in run:
            if raise_errors and score.error is not None:
                raise score.error
            scores[index] = score
            if bar is not None:
                bar.update()
    return scores


def score_all(engine: Engine, contexts: Any, continuations: Any, **options: Any) -> Any:
    """`Engine.score`."""
    contexts, continuations = plain(contexts), plain(continuations)
    if is_prompt(contexts):
        return score_all(engine, [contexts], [continuations], **options)[0]
    if len(contexts) != len(continuations):
        raise ValueError(
            f"continuations has {len(continuations)} entries for {len(contexts)} contexts: give each its own"
        )
    asked = [plain(entry) for entry in continuations]
    single = [is_prompt(entry) for entry in asked]
    asked = [[entry] if alone else [plain(each) for each in entry] for entry, alone in zip(asked, single, strict=True)]
    for value in (*contexts, *(each for entry in asked for each in entry)):
        is_prompt(plain(value))
    counts = list(map(len, asked))
    each_context = [plain(c) for c, count in zip(contexts, counts, strict=True) for _ in range(count)]
    pairs = encode_pairs(engine, each_context, [c for entry in asked for c in entry])
    scores = iter(score_pairs(engine, pairs, **options))
    shaped = [[next(scores) for _ in range(count)] for count in counts]
    return [entry[0] if alone else entry for entry, alone in zip(shaped, single, strict=True)]


def perplexities(engine: Engine, texts: Any, window: int | None, stride: int | None, **options: Any) -> list[Score]:
    """`Engine.perplexity`."""
    texts = plain(texts)
    texts = [texts] if is_prompt(texts) else [plain(text) for text in texts]
    most = engine.core.capacity.scorable
    window = most if window is None else window
    stride = window if stride is None else stride
    for name, value, top in (("window", window, most), ("stride", stride, window)):
        if not is_int(value) or not 1 <= value <= top:
            raise ValueError(f"{name}={value!r}: must be an int from 1 to {top}")
    encode = Encoder(engine, [text for text in texts if isinstance(text, str)])
    documents = [encode(text) for text in texts]
    cut = [windows(ids, encode.prefix, window, stride) for ids in documents]
    scores = iter(score_pairs(engine, [pair for pairs in cut for pair in pairs], **options))
    return [_joined(ids, [next(scores) for _ in pairs]) for ids, pairs in zip(documents, cut, strict=True)]


def _joined(ids: Sequence[int], parts: list[Score]) -> Score:
    """The score of a document, from those of its windows."""
    error = next((part.error for part in parts if part.error is not None), None)
    if error is not None:
        return Score(list(ids), [], [], error)
    return Score(list(ids), [x for part in parts for x in part.logprobs], [x for part in parts for x in part.greedy])
