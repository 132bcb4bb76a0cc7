"""What every engine of a benchmark is given: prompts as token ids and how many tokens each must make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_paged.integrations.bench.data import BadInput


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival; all arrive at once.

    prompts: token ids of each prompt. lengths: tokens each request makes, end-of-sequence tokens counted as
    any other.
    """

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.lengths):
            raise BadInput(f"{len(self.prompts)} prompts and {len(self.lengths)} lengths make no workload")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens to be made in all."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and output together."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths, strict=True))

    def only(self, rows: Sequence[int]) -> Workload:
        """The workload of some rows."""
        return Workload(tuple(self.prompts[i] for i in rows), tuple(self.lengths[i] for i in rows))


def build_workload(tokenizer: Any, texts: Sequence[str], lengths: Sequence[int], limit: int | None) -> Workload:
    """Tokenise texts.

    Args:
        tokenizer: a transformers tokenizer.
        limit: tokens that a row of the model may have; None: not known.

    Raises:
        BadInput: if a prompt is empty or a row would be longer than the model allows.
    """
    prompts = tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True), 1):
        if not prompt:
            raise BadInput(f"prompt {number} has no tokens")
        if limit is not None and len(prompt) + length > limit:
            raise BadInput(
                f"prompt {number} has {len(prompt)} tokens and is to make {length} more: the model takes {limit} in all"
            )
    return Workload(prompts, tuple(lengths))
