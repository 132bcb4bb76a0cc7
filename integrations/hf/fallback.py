"""Calls that the engine does not run: transformers' own loop, over paged storage where the model has any."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.generation.utils import GENERATION_MODES_MAPPING

from hf_paged.config import EngineConfig

logger = logging.getLogger("hf_paged")


def make_cache(model: nn.Module, config: EngineConfig) -> Any:
    """A paged cache for the model, or None, with a warning that says why, where it cannot page."""
    from hf_paged.integrations.cache import pageable, paged_cache_for

    reason = pageable(model.config)
    if reason is not None:
        logger.warning("%s cannot page its KV (%s): it runs with its own cache", type(model).__name__, reason)
        return None
    return paged_cache_for(model, page_size=config.page_size, num_pages=config.num_pages)


def transformers_loop(
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
    """A prepared batch in transformers' loop: greedy decoding, sampling, beams.

    Raises:
        ValueError: another strategy, which needs more than was prepared.
    """
    mode = generation_config.get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if method not in ("_sample", "_beam_search"):
        raise ValueError(
            f"custom_generate=hf_paged.generate cannot run {mode.value}: call hf_paged.enable() and use "
            'cache_implementation="paged" instead'
        )
    logger.info("transformers' own loop runs this call: %s", reason)
    cache = model_kwargs.get("past_key_values")
    if model_kwargs.get("use_cache", True) and (cache is None or not cache.get_seq_length()):
        paged = make_cache(model, config)
        if paged is not None and cache is not None:
            model_kwargs["past_key_values"] = paged
    extra = {"streamer": streamer} if method == "_sample" else {}
    return getattr(type(model), method)(
        model,
        input_ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=generation_config,
        **extra,
        **model_kwargs,
    )
