"""How a manager's requests become calls of `generate`: prepared once for all that ask for the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_paged.integrations.batching.requests import Job
from hf_paged.integrations.call import Call
from hf_paged.integrations.doors import PagedCall


class Recipes:
    """Makes a call of each request, with transformers' own preparation: processors, criteria and lengths are those that
    `generate` has for the same prompt alone.

    Args:
        original: transformers' `generate`.
        settings: of `enable`.
        generation_config: of the manager.
        engine: fields of `EngineConfig` that the manager's configuration sets.

    Attributes:
        max_sequences: rows that run together.
        sequences: rows of a request.

    Raises:
        ValueError: a setting that is not allowed.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        model: nn.Module,
        settings: dict[str, Any],
        generation_config: Any,
        engine: dict[str, Any],
    ) -> None:
        self.original, self.model, self.settings = original, model, settings
        self.generation_config, self.engine = generation_config, engine
        call = self._paged(generation_config, {})
        self.max_sequences = call.config.max_sequences
        self.sequences = call.effective().num_return_sequences or 1
        self._known: dict[Any, tuple[Any, dict[str, Any] | None]] = {}

    def make(self, job: Job) -> Call | torch.Tensor:
        """The request's call, not queued yet; or its ids `[rows, length]`, where only transformers' loop could run it.

        Raises:
            ValueError: `generate` refuses the request.
        """
        key = (job.max_new_tokens, job.eos_token_id, *sorted(job.sampling.items()))
        if key not in self._known:
            self._known[key] = self._prepare(job)
        config, arguments = self._known[key]
        ids = torch.tensor([job.prompt_ids], device=self.model.device)
        given = {"attention_mask": torch.ones_like(ids)}  # a prompt's tokens are tokens, whatever the pad is
        if arguments is None:
            return self._paged(config, given).run(ids)
        return self.original(self.model, ids, config, **arguments, **given)

    def eos_ids(self, job: Job) -> tuple[int, ...]:
        """What ends the request's rows."""
        ids = (
            self._paged(self.generation_config, {}).effective().eos_token_id
            if job.eos_token_id is None
            else job.eos_token_id
        )
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def _paged(self, config: Any, given: dict[str, Any]) -> PagedCall:
        return PagedCall(self.original, self.model, self.settings, config, given | {"cache_config": dict(self.engine)})

    def _prepare(self, job: Job) -> tuple[Any, dict[str, Any] | None]:
        """A generation config, and arguments with which `generate` returns a `Call`; None: the engine cannot run it."""
        config = copy.deepcopy(self.generation_config)
        asked = dict(job.sampling)
        if job.max_new_tokens is not None:
            asked["max_new_tokens"] = job.max_new_tokens
        if job.eos_token_id is not None:
            asked["eos_token_id"] = list(job.eos_token_id)
        for name, value in asked.items():
            setattr(config, name, value)
        call = self._paged(config, {})
        effective = call.effective()
        if call.why_not(effective) is not None:
            return config, None
        return call.generation_config, call.for_engine(effective, lambda call: call)
