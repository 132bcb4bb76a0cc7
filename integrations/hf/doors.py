"""`enable()`: `model.generate(..., cache_implementation="paged")` runs on the model's engine."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from hf_paged.config import EngineConfig
from hf_paged.integrations.assistance import ASKING, asked
from hf_paged.integrations.call import Call
from hf_paged.integrations.compat import runs_in_step_with_others
from hf_paged.integrations.fallback import make_cache
from hf_paged.integrations.generate import ENGINE_MODES, run_prepared
from hf_paged.integrations.generate import generate as paged_strategy
from hf_paged.integrations.vocabularies import tokenizer_pair
from hf_paged.params import SamplingParams

logger = logging.getLogger("hf_paged")
# Arguments of the decoding strategy `hf_paged.generate`, and what `generate` calls them.
STRATEGY_NAMES = {
    "draft_model": "assistant_model",
    "target_tokenizer": "tokenizer",
    "draft_tokenizer": "assistant_tokenizer",
    "engine_config": "cache_config",
}
_lock = threading.Lock()
# What stood where `enable` has put its own functions; None: nothing, the name was inherited.
_originals: dict[tuple[type, str], Any] = {}


def enable(**settings: Any) -> None:
    """Make `generate` take `cache_implementation="paged"` as a request for hf_paged. Every other call is untouched.

    So does `pipeline("text-generation")`, which then runs all rows of a call as one continuous batch. transformers' own
    batch API (`generate_batch`, `init_continuous_batching`, ...) runs on the same engine.

    Calling it again changes the settings; `disable` undoes it.

    Args:
        settings: fields of `EngineConfig`, for the engines of all models; `cache_config={...}` of a call goes before.
            A call also takes `prefix_caching=False` and `cache_salt="..."` (see `SamplingParams`), and `speculation`: a
            `SpeculationConfig`, a dict of its fields, or the name of a method.

    Raises:
        ValueError: an unknown or bad setting.
    """
    EngineConfig.from_dict(settings)
    with _lock:
        for owner, name, wrap in _hooks():
            current = getattr(owner, name)
            original = getattr(current, "_hf_paged_original", current)
            _originals.setdefault((owner, name), owner.__dict__.get(name))
            wrapped = functools.wraps(original)(wrap(original, dict(settings)))
            wrapped._hf_paged_original = original
            setattr(owner, name, wrapped)


def disable() -> None:
    """Put transformers' own functions back. Engines live on with their models."""
    with _lock:
        while _originals:
            (owner, name), original = _originals.popitem()
            if original is None:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _hooks() -> list[tuple[type, str, Callable[..., Any]]]:
    """What `enable` replaces: a class, a name in it, and what makes the new function of the old one and settings."""
    from transformers.pipelines.text_generation import TextGenerationPipeline

    from hf_paged.integrations.batching.doors import WRAPPERS
    from hf_paged.integrations.pipelines import wrap_iterator

    batching = [(GenerationMixin, name, wrap) for name, wrap in WRAPPERS.items()]
    pipelines = (TextGenerationPipeline, "get_iterator", wrap_iterator)
    return [(GenerationMixin, "generate", _wrap), pipelines, *batching]


def _wrap(original: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    def generate(self: nn.Module, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if setting("cache_implementation", kwargs, generation_config, self) != "paged":
            return original(self, inputs, generation_config, *args, **kwargs)
        names = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model")
        names += ("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate")
        kwargs.update(zip(names, args, strict=False))
        return PagedCall(original, self, settings, generation_config, kwargs).run(inputs)

    return generate


def setting(name: str, kwargs: dict[str, Any], generation_config: Any, model: nn.Module) -> Any:
    """A generation setting where `generate` looks for it: the keyword, the config given, the model's own."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(generation_config, name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _engine_config(settings: dict[str, Any], of_call: Any, sharing: dict[str, Any]) -> tuple[EngineConfig, str | None]:
    """The settings of `enable`, before them those of a call's `cache_config`, and before these its own arguments.

    Returns:
        the engine's settings, and the salt under which the call shares prefixes.

    Raises:
        ValueError: an unknown or bad setting.
    """
    salt = sharing.pop("cache_salt", None)
    if isinstance(of_call, EngineConfig):
        return replace(of_call, **sharing), salt
    if not isinstance(of_call, dict | None):
        raise ValueError(f"cache_config={of_call!r} is not allowed: a dict of engine settings, or an EngineConfig")
    of_call = (of_call or {}) | sharing
    salt = of_call.pop("cache_salt", None) if salt is None else salt
    pool = {"num_pages", "memory_fraction"}  # two ways to say one thing
    kept = {name: value for name, value in settings.items() if not (name in pool and pool & of_call.keys())}
    return EngineConfig.from_dict(kept | of_call), salt


class PagedCall:
    """One call of `generate` with `cache_implementation="paged"`: to the engine, or to transformers' own loop.

    Args:
        original: transformers' `generate`.
        settings: of `enable`.
        generation_config: as given by the caller, who may have given none; left as it is.
        kwargs: all other arguments by name.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        model: nn.Module,
        settings: dict[str, Any],
        generation_config: Any,
        kwargs: dict[str, Any],
    ) -> None:
        self.original, self.model, self.kwargs = original, model, kwargs
        if kwargs.get("custom_generate") is paged_strategy:
            self._take_strategy()
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "Passing both `cache_implementation` (used to initialize certain caches) and `past_key_values` (a "
                "Cache object) is unsupported. Please use only one of the two."
            )
        self.speculation = kwargs.pop("speculation", None)
        # Arguments of this door alone: `generate` does not know them.
        sharing = {name: kwargs.pop(name) for name in ("prefix_caching", "cache_salt") if name in kwargs}
        of_call = setting("cache_config", kwargs, generation_config, model)
        self.config, self.salt = _engine_config(settings, of_call, sharing)
        SamplingParams(cache_salt=self.salt)  # refuses what is no salt
        self.generation_config = copy.deepcopy(generation_config)
        for name in ("cache_implementation", "cache_config"):
            self._unset(name, kwargs)

    def _take_strategy(self) -> None:
        """`hf_paged.generate` is given as well, which asks for the same: what it takes, under the names used here."""
        del self.kwargs["custom_generate"]
        for ours, theirs in STRATEGY_NAMES.items():
            given = self.kwargs.pop(ours, None)
            if given is None:
                continue
            if self.kwargs.get(theirs) is not None:
                raise ValueError(f"{ours} and {theirs} are both given: they say the same, leave one out")
            self.kwargs[theirs] = given

    def _unset(self, name: str, kwargs: dict[str, Any]) -> None:
        """Take a setting away, wherever `generate` would find it."""
        kwargs.pop(name, None)
        if self.generation_config is not None:
            setattr(self.generation_config, name, None)
        if getattr(self.model.generation_config, name, None) is not None:
            kwargs[name] = None

    def run(self, inputs: Any, start: Callable[[Call], Any] = Call.run) -> Any:
        """The call.

        Args:
            start: what is done with the prepared `Call` where the engine can run it; its result is returned.
        """
        effective = self.effective()
        reason = self.why_not(effective)
        if reason is not None:
            return self._loop(inputs, effective, reason)
        return self.original(self.model, inputs, self.generation_config, **self.for_engine(effective, start))

    def effective(self) -> Any:
        """What the call amounts to, once its own settings and the model's are put together."""
        settings = {k: v for k, v in self.kwargs.items() if k not in ("tokenizer", "assistant_tokenizer")}
        return self.model._prepare_generation_config(self.generation_config, **settings)[0]

    def for_engine(self, effective: Any, start: Callable[[Call], Any]) -> dict[str, Any]:
        """Arguments with which transformers' `generate` prepares the call, then hands it to `start`."""
        kwargs = self._with_stop_strings(effective)
        config, salt, streamer = self.config, self.salt, kwargs.get("streamer")
        draft_model, theirs = kwargs.pop("assistant_model", None), kwargs.pop("assistant_tokenizer", None)
        tokenizers = None
        if draft_model is not None:
            tokenizers = tokenizer_pair(self.kwargs.get("tokenizer"), theirs, "assistant_tokenizer")
        drafting = asked(effective, draft_model, self.speculation), draft_model, tokenizers
        for name in ASKING:
            self._unset(name, kwargs)

        # With the parameters of a decoding method: any other name would be taken out of the caller's arguments.
        def engine(self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
            prepared = (self, input_ids, logits_processor, stopping_criteria, generation_config)
            return run_prepared(*prepared, config, streamer, model_kwargs, salt, drafting, start)

        return kwargs | {"custom_generate": engine}

    def why_not(self, effective: Any) -> str | None:
        """Why transformers' own loop must run the whole call; None where the engine may."""
        mode = effective.get_generation_mode(self.kwargs.get("assistant_model"))
        assisted = mode is GenerationMode.ASSISTED_GENERATION and not getattr(effective, "use_mtp", False)
        if mode not in ENGINE_MODES and not assisted:
            return f"it is {mode.value}"
        if getattr(self.model.config, "is_encoder_decoder", False):
            return "the model is an encoder-decoder"
        for name in ("synced_gpus", "custom_generate", "negative_prompt_ids", "negative_prompt_attention_mask"):
            value = self.kwargs.get(name)
            if value is not None and value is not False:
                return f"{name} is given"
        if self.kwargs.get("synced_gpus") is None and runs_in_step_with_others(self.model):
            return "the model is spread over processes"
        if effective.token_healing:
            return "token_healing is asked for"
        if assisted and getattr(effective, "assistant_ensemble_weight", None) is not None:
            return "assistant_ensemble_weight lets the assistant change what is drawn"
        return "use_cache is False" if effective.use_cache is False else None

    def _loop(self, inputs: Any, effective: Any, reason: str) -> Any:
        logger.info("transformers' own loop runs this call: %s", reason)
        kwargs = dict(self.kwargs)
        cache = make_cache(self.model, self.config) if effective.use_cache is not False else None
        if cache is not None:
            kwargs["past_key_values"] = cache
        return self.original(self.model, inputs, self.generation_config, **kwargs)

    def _with_stop_strings(self, effective: Any) -> dict[str, Any]:
        """The arguments, with `stop_strings` as a criterion: a callable strategy loses the tokenizer on its way."""
        kwargs = dict(self.kwargs)
        tokenizer = kwargs.pop("tokenizer", None)
        strings = effective.stop_strings
        if not strings or tokenizer is None:
            return kwargs
        self._unset("stop_strings", kwargs)
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or ())
        if not any(type(criterion) is StopStringCriteria for criterion in criteria):
            criteria.append(StopStringCriteria(tokenizer, strings))
        kwargs["stopping_criteria"] = criteria
        return kwargs
