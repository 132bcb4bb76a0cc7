"""`SamplingParams`: how one request is sampled, with vLLM's names and ranges, checked when made."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

GREEDY_BELOW = 1e-5  # a lower temperature divides float32 logits towards infinity; its limit is greedy
MAX_COMPLETIONS = 16384


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends. Frozen; a bad value is a ValueError.

    n: completions to return. best_of: completions to draw, of which the best n are returned (None: n).
    temperature: 0 is greedy (so is anything below 1e-5); else scores are divided by it.
    top_k: keep the k largest scores and their ties (0 or -1: all). top_p: keep the smallest set of most
        probable tokens that holds this much probability, (0, 1]. min_p: drop tokens less probable than
        this times the most probable one, [0, 1]. Applied in this order, as transformers does.
    presence_penalty, frequency_penalty: [-2, 2], subtracted once, or once an occurrence, from tokens in the
        output. repetition_penalty: > 0, divides positive and multiplies negative scores of tokens in the
        prompt or the output.
    stop: a string or strings that end a completion. stop_token_ids: token ids that end it. ignore_eos: the
        model's end-of-sequence token does not end it.
    max_tokens: at most this many generated tokens (None: until the engine's `max_model_len`). min_tokens:
        end-of-sequence and stop tokens are masked until this many were generated.
    seed: any int, taken modulo 2**64 (None: the engine chooses one).
    logprobs, prompt_logprobs: report the sampled (or given) token and this many most probable ones at each
        position (-1: the whole vocabulary; None: nothing).
    logit_bias: token id -> number added to its logit (-inf forbids it). bad_words: strings not to generate.
    logits_processors: callables (input_ids [1, L] int64, scores [1, V] float32) -> scores [1, V], as
        transformers' LogitsProcessor; called a row at a time. priority: a smaller number is served earlier.
    prefix_caching: share KV with requests that begin with the same tokens (None: as the engine does; False: neither
        use nor leave any). cache_salt: share with requests of the same salt only, a string or None.

    What is given for `stop`, `stop_token_ids`, `bad_words` and `logits_processors` is kept as a tuple.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: str | Iterable[str] | None = ()
    logits_processors: Iterable[Callable[..., Any]] | None = ()
    priority: float = 0.0
    prefix_caching: bool | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_numbers(self)
        _check_sequences(self)
        _check_combinations(self)

    @property
    def num_samples(self) -> int:
        """Completions to draw: `best_of`, or `n` where that is None."""
        return self.n if self.best_of is None else self.best_of

    @cached_property
    def greedy(self) -> bool:
        """The most probable token is taken; the seed, top_k, top_p and min_p then do nothing."""
        return self.temperature < GREEDY_BELOW

    @cached_property
    def filtered(self) -> bool:
        """Whether a random draw is narrowed by top_k, top_p or min_p."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @cached_property
    def penalised(self) -> bool:
        """Whether scores depend on tokens already seen, through one of the three penalties."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @cached_property
    def plain(self) -> bool:
        """Nothing changes the scores before temperature, but perhaps `min_tokens` and bad words."""
        return not self.penalised and not self.logit_bias

    @cached_property
    def bare(self) -> bool:
        """Greedy and plain, without log-probabilities."""
        return self.greedy and self.plain and self.logprobs is None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError, naming the argument, if one goes beyond a vocabulary of `vocab_size`."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            bad = [token for token in ids if not 0 <= token < vocab_size]
            if bad:
                raise ValueError(
                    f"{name} holds {bad}: token ids must be in 0..{vocab_size - 1}, this model's vocabulary"
                )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                raise ValueError(f"{name}={count}: must be at most {vocab_size}, this model's vocabulary size")


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ValueError(f"{name}={value!r}: must be {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_counts(p: SamplingParams) -> None:
    """Whole numbers: n, best_of, top_k, max_tokens, min_tokens, seed, logprobs, prompt_logprobs."""
    if not _is_int(p.n) or not 1 <= p.n <= MAX_COMPLETIONS:
        _refuse("n", p.n, f"an int in 1..{MAX_COMPLETIONS}")
    if p.best_of is not None and (not _is_int(p.best_of) or not p.n <= p.best_of <= MAX_COMPLETIONS):
        _refuse("best_of", p.best_of, f"None or an int in n..{MAX_COMPLETIONS} (n={p.n})")
    if not _is_int(p.top_k) or p.top_k < -1:
        _refuse("top_k", p.top_k, "an int: 0 or -1 to keep all tokens, or at least 1")
    if p.max_tokens is not None and (not _is_int(p.max_tokens) or p.max_tokens < 1):
        _refuse("max_tokens", p.max_tokens, "None or an int of at least 1")
    if not _is_int(p.min_tokens) or p.min_tokens < 0:
        _refuse("min_tokens", p.min_tokens, "an int of at least 0")
    if p.seed is not None and not _is_int(p.seed):
        _refuse("seed", p.seed, "None or an int")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        if value is True:  # as vLLM: True asks for one
            object.__setattr__(p, name, 1)
        elif value is not None and (not _is_int(value) or value < -1):
            _refuse(name, value, "None, -1 for the whole vocabulary, or an int of at least 0")


_RANGES = (
    ("temperature", lambda v: v >= 0, "a finite number of at least 0"),
    ("top_p", lambda v: 0 < v <= 1, "in (0, 1]"),
    ("min_p", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "in [-2, 2]"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "in [-2, 2]"),
    ("repetition_penalty", lambda v: v > 0, "a finite number greater than 0"),
    ("priority", lambda v: True, "a finite number"),
)


def _check_numbers(p: SamplingParams) -> None:
    for name, allowed, words in _RANGES:
        value = getattr(p, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            _refuse(name, value, f"a number, {words}")
        if not math.isfinite(value) or not allowed(value):
            _refuse(name, value, words)
    if not isinstance(p.ignore_eos, bool):
        _refuse("ignore_eos", p.ignore_eos, "True or False")
    if not isinstance(p.prefix_caching, bool | None):
        _refuse("prefix_caching", p.prefix_caching, "True, False or None")
    if not isinstance(p.cache_salt, str | None) or p.cache_salt == "":
        _refuse("cache_salt", p.cache_salt, "None or a string that is not empty")


def _check_sequences(p: SamplingParams) -> None:
    """Turn strings, lists and dicts into values that nobody changes later, and check what they hold."""
    for name in ("stop", "bad_words"):
        value = _as_tuple(p, name, "a string or a list of strings")
        if not all(isinstance(item, str) and item for item in value):
            _refuse(name, value, "non-empty strings")
    ids = _as_tuple(p, "stop_token_ids", "a list of ints")
    if not all(_is_int(token) and token >= 0 for token in ids):
        _refuse("stop_token_ids", ids, "ints of at least 0")
    if not all(callable(item) for item in _as_tuple(p, "logits_processors", "a list of callables")):
        _refuse("logits_processors", p.logits_processors, "callables")
    if p.logit_bias is not None:
        object.__setattr__(p, "logit_bias", _checked_bias(p.logit_bias))


def _as_tuple(p: SamplingParams, name: str, words: str) -> tuple[Any, ...]:
    value = getattr(p, name)
    if value is None:
        value = ()
    elif isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        _refuse(name, value, words)
    value = tuple(dict.fromkeys(value)) if name != "logits_processors" else tuple(value)
    object.__setattr__(p, name, value)
    return value


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        _refuse("logit_bias", bias, "None or a dict of token id -> number")
    for token, value in bias.items():
        if not _is_int(token) or token < 0:
            _refuse("logit_bias", bias, f"a dict whose keys are token ids, ints of at least 0 (not {token!r})")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or math.isnan(value) or value == math.inf:
            _refuse("logit_bias", bias, f"a dict whose values are finite numbers or -inf (not {value!r})")
    return {token: float(value) for token, value in bias.items()}


def _check_combinations(p: SamplingParams) -> None:
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        _refuse("min_tokens", p.min_tokens, f"at most max_tokens={p.max_tokens}")
    if p.greedy and p.num_samples > 1:
        name = "n" if p.n > 1 else "best_of"
        _refuse(name, p.num_samples, "1 with temperature=0: greedy completions would all be the same")
