"""One call of `generate`, after transformers has prepared it, on the model's engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation.configuration_utils import GenerationMode

from hf_paged.config import EngineConfig
from hf_paged.integrations.assistance import ASKING, asked, speculator_for
from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.call import Call
from hf_paged.integrations.engine import Engine
from hf_paged.integrations.fallback import transformers_loop
from hf_paged.integrations.parallel import by_one_clock
from hf_paged.integrations.processors import LOOP_ONLY, Criteria, RowPrompt
from hf_paged.integrations.registry import REGISTRY
from hf_paged.integrations.vocabularies import Pair, tokenizer_pair
from hf_paged.speculation.config import SpeculationConfig

ENGINE_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What `generate` hands to a decoding method for every model, and the engine sees to itself.
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    draft_model: Any = None,
    target_tokenizer: Any = None,
    draft_tokenizer: Any = None,
    engine_config: EngineConfig | dict[str, Any] | None = None,
    cache_salt: str | None = None,
    speculation: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A strategy for `model.generate(..., custom_generate=hf_paged.generate)`; nothing is patched.

    `generate` hands no streamer, no assistant model and no tokenizer (for `stop_strings`) to a strategy: with these,
    use `enable()` and `cache_implementation="paged"`.

    Args:
        draft_model: a causal model that drafts.
        target_tokenizer, draft_tokenizer: the model's and the draft model's, where their vocabularies differ.
            (`generate` keeps `tokenizer` and `assistant_tokenizer` to itself.)
        engine_config: an `EngineConfig`, or a dict of its fields.
        cache_salt: as in `SamplingParams`.
        speculation: a `SpeculationConfig`, a dict of its fields, or the name of a method.

    Returns:
        what `generate` returns: `[batch, length]` ids, or a dict-like output.

    Raises:
        ValueError: a bad setting, or a strategy that this door does not open.
    """
    tokenizers = tokenizer_pair(target_tokenizer, draft_tokenizer)
    drafting = asked(generation_config, draft_model, speculation), draft_model, tokenizers
    config = (
        engine_config if isinstance(engine_config, EngineConfig) else EngineConfig.from_dict(dict(engine_config or {}))
    )
    prepared = (model, input_ids, logits_processor, stopping_criteria, generation_config)
    return run_prepared(*prepared, config, None, model_kwargs, cache_salt, drafting)


def run_prepared(
    model: nn.Module,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    generation_config: Any,
    config: EngineConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
    salt: str | None = None,
    drafting: tuple[SpeculationConfig | None, nn.Module | None, Pair | None] = (None, None, None),
    start: Callable[[Call], Any] = Call.run,
) -> Any:
    """A prepared batch, on the engine where it can, else in transformers' loop.

    Args:
        drafting: who drafts, the draft model, and both tokenizers where they may differ.
        start: what is done with a call that the engine can run.
    """
    for name in ASKING:  # they are in `drafting` now: without them it is greedy search or sampling
        setattr(generation_config, name, None)
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    reason = _why_not(prompts, processors, criteria, generation_config, model_kwargs)
    if reason is None:
        try:
            engine = REGISTRY.engine_for(model, config)
            reason = _why_not_on(engine, prompts, Criteria.of(criteria).max_length - input_ids.shape[1])
        except CannotDrive as error:
            reason = str(error)
    if reason is not None:
        return transformers_loop(
            model, input_ids, processors, criteria, generation_config, config, streamer, model_kwargs, reason
        )
    text_config = model.config.get_text_config(decoder=True)
    criteria = Criteria.of(by_one_clock(criteria, engine.team))
    sharing = {"prefix_caching": config.prefix_caching, "cache_salt": salt}
    prepared = (input_ids, prompts, processors, criteria, generation_config, streamer)
    return start(Call(engine, text_config, *prepared, sharing, speculator_for(engine, *drafting)))


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[RowPrompt] | None:
    """The rows without their left pads; None where a row has other gaps, or nothing but pads."""
    ids = input_ids.tolist()
    if mask is None:
        return [RowPrompt(i, row, 0) for i, row in enumerate(ids)]
    if mask.shape != input_ids.shape:
        return None
    mask = mask.ne(0)
    pads = (~mask).sum(-1)
    expected = torch.arange(mask.shape[1], device=mask.device) >= pads[:, None]
    if not torch.equal(mask, expected) or int(pads.max()) == mask.shape[1]:
        return None
    return [RowPrompt(i, row[p:], p) for i, (row, p) in enumerate(zip(ids, pads.tolist(), strict=True))]


def _why_not(prompts, processors, criteria, generation_config, model_kwargs) -> str | None:
    """Why transformers' own loop must run this call; None where the engine can."""
    mode = generation_config.get_generation_mode()
    if mode not in ENGINE_MODES:
        return f"it is {mode.value}"
    if prompts is None:
        return "the attention mask has holes, right pads or empty rows"
    if not prompts or not prompts[0].ids:
        return "the prompt is empty"
    extra = sorted(k for k, v in model_kwargs.items() if k not in PREPARED and v is not None)
    if extra:
        return f"the model takes {', '.join(extra)}"
    if not model_kwargs.get("use_cache", True):
        return "use_cache is False"
    if _past_length(model_kwargs.get("past_key_values")):
        return "past_key_values hold tokens already"
    if not _usual_positions(prompts, model_kwargs.get("position_ids")):
        return "position_ids are given"
    for processor in processors or ():
        if isinstance(processor, LOOP_ONLY):
            return f"{type(processor).__name__} needs it"
    if Criteria.of(criteria).max_length is None:
        return "there is no maximal length"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, None):
            return f"{name} is asked for"
    return None


def _why_not_on(engine: Engine, prompts: list[RowPrompt], new_tokens: int) -> str | None:
    """Why this engine cannot run the call; None where it can."""
    if engine.stepping:
        return "it is made inside a step of the model's engine"
    steady, longest = engine.facts.steady_length, max(len(p.ids) for p in prompts) + new_tokens
    if steady is not None and longest > steady:
        return f"the model's rotary embeddings change beyond {steady} tokens, and a row may have {longest}"
    return None


def _past_length(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def _usual_positions(prompts: list[RowPrompt], position_ids: torch.Tensor | None) -> bool:
    """Whether each row's tokens stand at 0, 1, 2, ... (what stands at pads does not matter)."""
    if position_ids is None:
        return True
    if position_ids.dim() != 2:
        return False
    positions = position_ids.expand(len(prompts), -1).tolist()
    return all(row[p.pads :] == list(range(len(p.ids))) for p, row in zip(prompts, positions, strict=True))
