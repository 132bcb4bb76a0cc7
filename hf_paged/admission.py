"""What a request must satisfy before it is queued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

from hf_paged.params import SamplingParams
from hf_paged.scoring import Scoring


@dataclass(frozen=True)
class Capacity:
    """Tokens a sequence may have: by the model, and by a pool of `num_pages` pages of `page_size` tokens."""

    max_model_len: int
    num_pages: int
    page_size: int
    vocab_size: int

    @property
    def limit(self) -> tuple[int, str]:
        """Most tokens of one sequence, and the name of what sets it."""
        # The last token's KV is never stored: a pool of n slots can hold a sequence of n + 1 tokens.
        pool = self.num_pages * self.page_size + 1
        if pool < self.max_model_len:
            return pool, f"the KV pool ({self.num_pages} pages of {self.page_size} tokens)"
        return self.max_model_len, "max_model_len"

    @property
    def scorable(self) -> int:
        """Most tokens that may stand before the last one of a text that is scored; all their KV is stored."""
        return min(self.max_model_len, self.num_pages * self.page_size)


def checked_prompt(prompt_ids: Sequence[int], capacity: Capacity) -> list[int]:
    """The prompt as a list of ints.

    Raises:
        ValueError: it is empty, or holds something other than a token id of the vocabulary.
    """
    try:
        ids = [index(token) for token in prompt_ids]
    except TypeError as error:
        raise ValueError(f"the prompt must be a text or a list of token ids, which are ints: {error}") from None
    if not ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    low, high = min(ids), max(ids)
    if low < 0 or high >= capacity.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"token id {bad} of the prompt is outside the vocabulary: 0 to {capacity.vocab_size - 1}")
    return ids


def checked_length(length: int, params: SamplingParams, capacity: Capacity) -> int:
    """Tokens to generate at most, for a prompt of `length` tokens.

    Raises:
        ValueError: prompt and output do not fit, or a parameter names a token outside the vocabulary.
    """
    params.check_vocabulary(capacity.vocab_size)
    limit, which = capacity.limit
    if length >= limit:
        raise ValueError(f"the prompt has {length} tokens: {which} allows {limit}, at least one new token included")
    if params.max_tokens is None:
        return limit - length
    if length + params.max_tokens > limit:
        raise ValueError(
            f"the prompt has {length} tokens and max_tokens={params.max_tokens}: {which} allows {limit} tokens in all"
        )
    return params.max_tokens


def checked_scoring(token_ids: Sequence[int], scoring: Scoring, capacity: Capacity) -> list[int]:
    """The tokens of a request that scores, as a list of ints.

    Raises:
        ValueError: they do not fit, one is outside the vocabulary, or there is nothing to score.
    """
    ids = checked_prompt(token_ids, capacity)
    if not 1 <= scoring.start <= len(ids):
        raise ValueError(f"start={scoring.start}: must be 1 to {len(ids)}, the number of tokens")
    if not scoring.ends:  # the last token would be computed for nothing, and nobody would see whether its KV is good
        raise ValueError("ends is empty: give the last token to score there")
    checked_prompt(scoring.ends, capacity)
    most = capacity.scorable
    if len(ids) > most:
        limit, which = capacity.limit
        raise ValueError(f"{len(ids)} tokens go before the last one that is scored: {which} allows {most}")
    return ids


def bad_word_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Token ids of words that may not be generated, each as it stands at the beginning of a text and behind a space."""
    forms = [form for word in words for form in (word, " " + word.lstrip())]
    return tuple(dict.fromkeys(ids for ids in (tuple(encode(form)) for form in forms) if ids))
