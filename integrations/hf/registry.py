"""The engines that belong to models: one each, for as long as the model lives."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_paged.config import EngineConfig
from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.engine import Engine


def _signature(model: nn.Module) -> tuple[Any, ...]:
    """What an engine was made for."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise CannotDrive("it has no ordinary input embeddings")
    kind = weight.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (autocast, weight.device, weight.dtype, weight.shape[0], len(getattr(model, "peft_config", None) or ()))


class EngineRegistry:
    """Engines by model, weakly: a model that is freed takes its engine and its KV memory with it."""

    def __init__(self) -> None:
        # What it was made for, and the engine, or why there is none.
        self._engines: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Engine | str]]
        self._engines = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def engine_for(self, model: nn.Module, config: EngineConfig) -> Engine:
        """The model's engine, made anew if the settings, the model's device, its dtype or its vocabulary changed.

        Raises:
            CannotDrive: the model needs transformers' own loop.
        """
        with self._lock:
            config = replace(config, prefix_caching=True)  # calls and requests turn it off for themselves
            signature = _signature(model)
            known = self._engines.get(model)
            if known is not None and known[0][0] == signature:
                if isinstance(known[1], str):
                    raise CannotDrive(known[1])
                if known[0][1] == config:
                    return known[1]
            # `generate` lets a text grow past the positions that a model was made for: so does its engine.
            wanted = replace(config, max_model_len=config.max_model_len or 1 << 40)
            try:
                made = Engine(model, wanted, model_ref=weakref.ref(model))
            except CannotDrive as error:
                # Its words alone: an exception holds frames, and these hold the model.
                self._engines[model] = ((signature, config), str(error))
                raise
            self._engines[model] = ((signature, config), made)
            return made

    def find(self, model: nn.Module) -> Engine | None:
        """The model's engine, if it has one."""
        with self._lock:
            made = self._engines.get(model, (None, None))[1]
            return made if isinstance(made, Engine) else None

    def forget(self, model: nn.Module) -> None:
        """Drop the model's engine."""
        with self._lock:
            self._engines.pop(model, None)

    def engines(self) -> list[Engine]:
        """All engines there are."""
        with self._lock:
            return [made for _, made in self._engines.values() if isinstance(made, Engine)]


# Weak and per model: it holds no setting that two models could disagree on.
REGISTRY = EngineRegistry()
