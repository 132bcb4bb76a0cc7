"""Settings of speculation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hf_paged.config import is_int, require

METHODS = ("off", "draft", "lookup", "suffix", "layer_skip", "auto")
MAX_DRAFT_TOKENS, MAX_NGRAM = 64, 16
USUAL, LONGEST = 8, 32  # drafts one behind another where nothing is said: of all; of texts that repeat others


@dataclass(frozen=True)
class SpeculationConfig:
    """Who drafts, and how much.

    Attributes:
        method: `draft` (a draft model), `lookup` (n-grams of the row's own tokens), `suffix` (continuations seen in any
            text), `layer_skip` (the target's first layers), `auto` (of what is there, what pays most, row by row), or
            `off`.
        max_draft_tokens: most draft tokens one behind another, 0 to 64. Default: 8, and of a text that repeats another
            one as many as the two had in common just before, up to 32 (after SuffixDecoding; `adaptive` only).
        tree_width: most draft tokens beside each other, 1 to 8; with 1 drafts never branch.
        adaptive: draft only as much as pays by measured acceptance and cost; False: always `max_draft_tokens`.
        max_matching_ngram_size: longest n-gram that lookup matches, 1 to 16.
        confidence_threshold: a draft model stops before a token to which it gives less than this, 0 to 1.
        early_exit: layers of the target that draft with `layer_skip`.
        suffix_tokens: tokens that the suffix index remembers, at about 50 bytes each.
    """

    method: str = "auto"
    max_draft_tokens: int | None = None
    tree_width: int = 4
    adaptive: bool = True
    max_matching_ngram_size: int = 3
    confidence_threshold: float = 0.0
    early_exit: int | None = None
    suffix_tokens: int = 1 << 18

    def __post_init__(self) -> None:
        self._require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        for name, low, high in (
            ("max_draft_tokens", 0, MAX_DRAFT_TOKENS),
            ("tree_width", 1, 8),
            ("max_matching_ngram_size", 1, MAX_NGRAM),
            ("suffix_tokens", 64, 1 << 28),
        ):
            value = getattr(self, name)
            unsaid = value is None and name == "max_draft_tokens"
            self._require(unsaid or (is_int(value) and low <= value <= high), name, f"an integer from {low} to {high}")
        self._require(isinstance(self.adaptive, bool), "adaptive", "True or False")
        value = self.confidence_threshold
        number = isinstance(value, int | float) and not isinstance(value, bool)
        self._require(number and 0 <= value <= 1, "confidence_threshold", "a number from 0 to 1")
        value = self.early_exit
        self._require(
            value is None or (is_int(value) and value >= 1), "early_exit", "an integer of at least 1, or None"
        )
        wanted = self.method != "layer_skip" or value is not None
        self._require(wanted, "early_exit", 'method="layer_skip" needs the number of layers that draft')

    def _require(self, ok: bool, name: str, allowed: str) -> None:
        require(ok, name, getattr(self, name), allowed, "SpeculationConfig")

    @property
    def off(self) -> bool:
        """Whether nothing is ever drafted."""
        return self.method == "off" or self.max_draft_tokens == 0

    @property
    def deepest(self) -> int:
        """Most drafts one behind another of a draft model, and of texts that have little in common."""
        return USUAL if self.max_draft_tokens is None else self.max_draft_tokens

    @property
    def deepest_of_texts(self) -> int:
        """Most of texts."""
        return LONGEST if self.max_draft_tokens is None and self.adaptive else self.deepest

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> SpeculationConfig:
        """Build from a mapping, refusing unknown names.

        Raises:
            ValueError: on an unknown name or a bad value.
        """
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise ValueError(f"unknown speculation setting {name!r}: allowed are {', '.join(names)}")
        return cls(**settings)
