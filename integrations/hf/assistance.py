"""What a call of `generate` says about speculation, in transformers' words or in ours."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.drafters import speculation_settings
from hf_paged.integrations.engine import Engine
from hf_paged.integrations.vocabularies import Pair
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.speculator import Speculator

logger = logging.getLogger("hf_paged")
# Settings that ask for speculation, and those that say how.
ASKING = ("prompt_lookup_num_tokens", "assistant_early_exit")


def asked(config: Any, draft_model: nn.Module | None, given: Any = None) -> SpeculationConfig | None:
    """Settings of a call: `given` in our words, else what its generation config asks for. None: nothing is drafted.

    A number of tokens is the most that is drafted; how many are is decided by what pays.

    Raises:
        ValueError: a bad setting.
    """
    if given is not None:
        return speculation_settings(given, draft_model)
    lookup, layers = config.prompt_lookup_num_tokens, config.assistant_early_exit
    settings: dict[str, Any] = {}
    own = getattr(draft_model, "generation_config", None)  # where transformers looks for what the call does not say

    def said(name: str) -> Any:
        value = getattr(config, name)
        return getattr(own, name, None) if value is None else value

    if draft_model is not None:
        settings["method"] = "auto" if lookup else "draft"
        most = said("num_assistant_tokens")
    elif layers is not None:
        settings |= {"method": "layer_skip", "early_exit": layers}
        most = config.num_assistant_tokens
    elif lookup is not None:
        settings["method"], most = "lookup", lookup
    else:
        return None
    if most is not None:
        settings["max_draft_tokens"] = min(int(most), 64)
    if config.max_matching_ngram_size is not None:
        settings["max_matching_ngram_size"] = config.max_matching_ngram_size
    threshold = said("assistant_confidence_threshold")
    if threshold is not None:
        settings["confidence_threshold"] = threshold
    return speculation_settings(settings, draft_model)


def speculator_for(
    engine: Engine,
    config: SpeculationConfig | None,
    draft_model: nn.Module | None,
    tokenizers: Pair | None = None,
) -> Speculator | None:
    """Who drafts in a call on this engine.

    Raises:
        ValueError: the draft model does not fit the model.
    """
    try:
        return engine.speculator_for(config, draft_model, tokenizers)
    except CannotDrive as error:
        logger.warning("nothing is drafted: %s cannot be driven (%s)", type(draft_model).__name__, error)
        return None
