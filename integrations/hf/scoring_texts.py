"""Texts to score, as token ids.

Context and continuation are tokenised as lm-evaluation-harness does (`TemplateLM._encode_pair`), documents are cut into
windows as its `get_rolling_token_windows` cuts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from hf_paged.integrations.prompts import Prompt

if TYPE_CHECKING:
    from hf_paged.integrations.engine import Engine


@dataclass(frozen=True)
class Pair:
    """A continuation to score behind a context, in token ids.

    Attributes:
        shared: whether others may use the context's KV.
        error: why it cannot be scored.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    shared: bool = True
    error: Exception | None = None


def is_prompt(value: Any) -> bool:
    """Whether `value` is one text, or the token ids of one, rather than several.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is a {type(value).__name__}: give a text, token ids, or a list of either")
    return isinstance(value, str) or (len(value) > 0 and isinstance(value[0], Integral))


class Encoder:
    """Texts → token ids.

    Args:
        engine: whose tokenizer it is.
        texts: those that are going to be asked for: they are encoded at once.
    """

    def __init__(self, engine: Engine, texts: Sequence[str]) -> None:
        self.engine, tokenizer = engine, engine.tokenizer
        if texts and tokenizer is None:
            raise ValueError("a text needs a tokenizer: give the engine one, or token ids")
        distinct = list(dict.fromkeys(texts))
        self._ids = dict(
            zip(distinct, tokenizer(distinct, verbose=False)["input_ids"] if distinct else (), strict=True)
        )

    def __call__(self, text: Prompt) -> list[int]:
        return self._ids[text] if isinstance(text, str) else text

    def behind(self, text: Prompt) -> Sequence[int]:
        """Of a text that begins none: without special tokens."""
        if not isinstance(text, str):
            return text
        return self.engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def prefix(self) -> int:
        """The token before all texts: BOS, or EOS where there is none.

        Raises:
            ValueError: there is neither.
        """
        for owner in (self.engine.tokenizer, self.engine.target().config):
            for name in ("bos_token_id", "eos_token_id"):
                token = getattr(owner, name, None)
                if isinstance(token, int):
                    return token
        raise ValueError("the context is empty, and the model has no BOS or EOS token to put there: give one token")


def _split(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to what follows: so they are tokenised as in running text."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def encode_pairs(engine: Engine, contexts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[Pair]:
    """Tokens of each context and its continuation.

    Raises:
        ValueError: a text, and no tokenizer.
    """
    both = [
        _split(a, b) if isinstance(a, str) and isinstance(b, str) and a.strip() else (a, b)
        for a, b in zip(contexts, continuations, strict=True)
    ]
    texts = [text for a, b in both if isinstance(a, str) and len(a) for text in (a, a + b if isinstance(b, str) else a)]
    encode = Encoder(engine, texts)
    pairs = []
    for context, continuation in both:
        try:
            pairs.append(_encode_pair(encode, context, continuation))
        except ValueError as error:
            pairs.append(Pair((), (), error=error))
    return pairs


def _encode_pair(encode: Encoder, context: Prompt, continuation: Prompt) -> Pair:
    if not len(continuation):
        raise ValueError("the continuation is empty: at least one token is needed")
    if not len(context):
        ids = encode.behind(continuation)
        first = [encode.prefix] if ids[0] != encode.prefix else ids[:1]
        return Pair(first, ids if ids[0] != encode.prefix else ids[1:])
    if isinstance(context, str) and isinstance(continuation, str):
        begin = encode(context)
        return Pair(begin, encode(context + continuation)[len(begin) :])
    return Pair(encode(context), encode.behind(continuation))


def windows(ids: Sequence[int], prefix: int, window: int, stride: int) -> list[Pair]:
    """A document's tokens, each scored once: up to `window` of them behind `prefix`, then `stride` at a time behind as
    many others as make a window of `window` inputs."""
    pairs = [Pair([prefix], ids[:window])]
    for begin in range(window, len(ids), stride):
        end = min(begin + stride, len(ids))
        pairs.append(Pair(ids[end - window - 1 : begin], ids[begin:end], shared=False))
    return pairs
