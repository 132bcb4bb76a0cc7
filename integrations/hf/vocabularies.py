"""Tokenizers of a target and of a draft model that has another: what one says, as the other reads it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_paged.speculation.mirror import Vocabulary
from hf_paged.text import Decode

Encode = Callable[[str], list[int]]
Pair = tuple[Any, Any]  # the target's tokenizer, the draft's


def tokenizer_pair(tokenizer: Any, other: Any, name: str = "draft_tokenizer") -> Pair | None:
    """The target's tokenizer and `other`, the draft's, which the caller knows as `name`; None where that is not given.

    Raises:
        ValueError: `other` alone is given, or something that is no tokenizer.
    """
    if other is None:
        return None
    if tokenizer is None:
        raise ValueError(f"{name} is given without the model's own tokenizer: give both")
    for which, given in (("tokenizer", tokenizer), (name, other)):
        if not (callable(given) and hasattr(given, "get_vocab") and hasattr(given, "decode")):
            raise ValueError(f"{which}={type(given).__name__}: must be a tokenizer of transformers")
    return tokenizer, other


def same_vocabulary(pair: Pair) -> bool:
    """Whether a token has the same id for both."""
    return pair[0] is pair[1] or pair[0].get_vocab() == pair[1].get_vocab()


def vocabularies(pair: Pair, sizes: tuple[int, int]) -> tuple[Vocabulary, Vocabulary]:
    """How target and draft are read and written. Text decoded by one may be encoded by the other: special tokens go by
    the other's names, and those that it lacks are left out.

    Args:
        sizes: ids that each model takes.
    """
    return _vocabulary(*pair, sizes[0]), _vocabulary(*pair[::-1], sizes[1])


def _vocabulary(tokenizer: Any, other: Any, size: int) -> Vocabulary:
    decode, encode = _private(tokenizer)
    special = _special(tokenizer)
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    opening = next((whole[:at] for at in range(len(whole)) if whole[at : at + len(plain)] == plain), [])
    return Vocabulary(_renaming(decode, special, _names(tokenizer, other)), encode, size, tuple(opening), special)


def _special(tokenizer: Any) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _private(tokenizer: Any) -> tuple[Decode, Encode]:
    """Functions that nobody else's use of a tokenizer can disturb: it may be told to cut or pad, in another thread."""
    if not getattr(tokenizer, "is_fast", False):
        return (
            lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        )
    own = copy.deepcopy(tokenizer.backend_tokenizer)
    own.no_truncation()
    own.no_padding()
    return (
        lambda ids: own.decode(ids, skip_special_tokens=False),
        lambda text: own.encode(text, add_special_tokens=False).ids,
    )


def _names(tokenizer: Any, other: Any) -> dict[str, str]:
    """What each special token is called by the other tokenizer; nothing where it has no such token."""
    known = {str(token) for token in other.added_tokens_decoder.values() if token.special}
    names = {str(token): str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {name: name if name in known else "" for name in names}
    for kind in ("bos_token", "eos_token"):
        name = getattr(tokenizer, kind)
        if name is not None and not names.get(name):
            names[name] = getattr(other, kind) or ""
    return names


def _renaming(decode: Decode, special: frozenset[int], names: dict[str, str]) -> Decode:
    """`decode`, with other names for special tokens."""
    if not names:
        return decode
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))

    def renamed(ids: Sequence[int]) -> str:
        text = decode(ids)
        return text if special.isdisjoint(ids) else pattern.sub(lambda found: names[found[0]], text)

    return renamed
