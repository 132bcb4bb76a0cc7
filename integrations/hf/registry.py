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
    """What an engine's memory was laid out for."""
    weight = model.get_input_embeddings().weight
    return (weight.device, weight.dtype, weight.shape[0], len(getattr(model, "peft_config", None) or ()))


class EngineRegistry:
    """Engines by model, weakly: a model that is freed takes its engine and its KV memory with it."""

    def __init__(self) -> None:
        self._engines: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Engine | CannotDrive]]
        self._engines = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def engine_for(self, model: nn.Module, config: EngineConfig) -> Engine:
        """The model's engine, made anew if the settings, the model's device, its dtype or its vocabulary changed.

        Raises:
            CannotDrive: the model needs transformers' own loop.
        """
        with self._lock:
            signature = _signature(model)
            known = self._engines.get(model)
            if known is not None and known[0][0] == signature:
                if isinstance(known[1], CannotDrive):
                    raise known[1]
                if known[0][1] == config:
                    return known[1]
            try:
                # `generate` lets a text grow past the positions that a model was made for: so does its engine.
                wanted = replace(config, max_model_len=config.max_model_len or 1 << 40)
                made: Engine | CannotDrive = Engine(model, wanted, model_ref=weakref.ref(model))
            except CannotDrive as error:
                made = error.with_traceback(None)
            self._engines[model] = ((signature, config), made)
            if isinstance(made, CannotDrive):
                raise made
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


def inference_device(model: nn.Module) -> torch.device:
    """Where ids of a batch are put: the device of the input embeddings."""
    return model.get_input_embeddings().weight.device


# Weak and per model: it holds no setting that two models could disagree on.
REGISTRY = EngineRegistry()
