"""Prompts as callers give them: texts, token ids, or lists of either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from hf_paged.outputs import RequestMetrics, RequestOutput

Prompt = str | Sequence[int]


def listed(prompts: Any) -> list[Prompt]:
    """A list of prompts, whichever way they were given: a text, token ids (a list or a tensor), or several of either.

    Raises:
        ValueError: they are something else.
    """
    prompts = plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts is a {type(prompts).__name__}: give a text, a list of token ids, or a list of either"
        )
    prompts = [plain(prompt) for prompt in prompts]
    return [prompts] if prompts and isinstance(prompts[0], Integral) else prompts


def plain(value: Any) -> Any:
    """A tensor or an array as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def refused(prompt: Any, index: int, error: Exception) -> RequestOutput:
    """The result of a prompt that was not queued."""
    text = prompt if isinstance(prompt, str) else None
    ids = list(prompt) if text is None and isinstance(prompt, Iterable) else []
    return RequestOutput(f"refused-{index}", text, ids, [], None, error, RequestMetrics(0.0), True)
