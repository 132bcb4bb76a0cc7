"""Calls that the engine does not run: transformers' own loop, over paged storage where the model has any."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from hf_paged.config import EngineConfig

logger = logging.getLogger("hf_paged")


def make_cache(model: nn.Module, config: EngineConfig) -> Any:
    """A `PagedCache` for the model, or None, with a warning that says why, where it cannot page."""
    from hf_paged.integrations.cache import PagedCache, pageable

    reason = pageable(model.config)
    if reason is None and getattr(model.config, "is_encoder_decoder", False):
        reason = "an encoder-decoder keeps two caches"
    if reason is not None:
        logger.warning("%s cannot page its KV (%s): it runs with its own cache", type(model).__name__, reason)
        return None
    return PagedCache(model.config, page_size=config.page_size, num_pages=config.num_pages)


def transformers_sample(
    model: nn.Module,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    generation_config: Any,
    config: EngineConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
    reason: str,
) -> Any:
    """Greedy decoding or sampling of a prepared batch in transformers' loop."""
    logger.info("transformers' own loop runs this call: %s", reason)
    cache = model_kwargs.get("past_key_values")
    if model_kwargs.get("use_cache", True) and cache is not None and not cache.get_seq_length():
        paged = make_cache(model, config)
        if paged is not None:
            model_kwargs["past_key_values"] = paged
    return type(model)._sample(
        model,
        input_ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )
