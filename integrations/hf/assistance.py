"""What a call of `generate` says about speculation, in transformers' words or in ours."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from hf_paged.config import is_int, require
from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.drafters import speculation_settings
from hf_paged.integrations.engine import Engine
from hf_paged.integrations.vocabularies import Pair
from hf_paged.speculation.config import MAX_DRAFT_TOKENS, MAX_NGRAM, SpeculationConfig
from hf_paged.speculation.speculator import Speculator

logger = logging.getLogger("hf_paged")
# Settings that ask for speculation, and those that say how.
ASKING = ("prompt_lookup_num_tokens", "assistant_early_exit")


def asked(config: Any, draft_model: nn.Module | None, given: Any = None) -> SpeculationConfig | None:
    """Settings of a call: `given` in our words, else what its generation config asks for. None: nothing is drafted.

    A number of tokens is the most that is drafted, of which more than 64 are never of use; how many are is decided by
    what pays.

    Raises:
        ValueError: a bad setting.
    """
    weight = getattr(config, "assistant_ensemble_weight", None)
    lossless = draft_model is None or weight is None
    require(lossless, "assistant_ensemble_weight", weight, "drafts change no token here: None", "GenerationConfig")
    if given is not None:
        return speculation_settings(given, draft_model)
    lookup, layers = _count(config, "prompt_lookup_num_tokens", 1), _count(config, "assistant_early_exit", 1)
    settings: dict[str, Any] = {}
    own = getattr(draft_model, "generation_config", None)  # where transformers looks for what the call does not say

    def where(name: str) -> Any:
        return config if getattr(config, name) is not None else own

    if layers is not None:  # as in transformers, it goes before an assistant
        settings |= {"method": "layer_skip", "early_exit": layers}
        draft_model, most = None, _count(config, "num_assistant_tokens", 0)
    elif draft_model is not None:
        settings["method"] = "auto" if lookup else "draft"
        most = _count(where("num_assistant_tokens"), "num_assistant_tokens", 0)
    elif lookup is not None:
        settings["method"], most = "lookup", lookup
    else:
        return None
    if most is not None:
        settings["max_draft_tokens"] = min(most, MAX_DRAFT_TOKENS)
    ngram = _count(config, "max_matching_ngram_size", 1)
    if ngram is not None:
        settings["max_matching_ngram_size"] = min(ngram, MAX_NGRAM)
    threshold = getattr(where("assistant_confidence_threshold"), "assistant_confidence_threshold", None)
    if threshold is not None:
        number = isinstance(threshold, int | float) and 0 <= threshold <= 1
        require(number, "assistant_confidence_threshold", threshold, "a number from 0 to 1", "GenerationConfig")
        settings["confidence_threshold"] = float(threshold)
    return speculation_settings(settings, draft_model)


def _count(config: Any, name: str, least: int) -> int | None:
    """A setting that is an integer of at least so much, or None."""
    value = getattr(config, name, None)
    fine = value is None or (is_int(value) and value >= least)
    require(fine, name, value, f"an integer of at least {least}, or None", "GenerationConfig")
    return value


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
        logger.warning("nothing is drafted: %s", error)
        return None
