"""Every fact about a version of transformers: 5.17 to 5.23 are supported."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import is_deepspeed_zero3_enabled, is_fsdp_managed_module


def cache_layer_kinds(config: PreTrainedConfig) -> list[tuple[str, int | None]]:
    """What the default cache stores for each layer: transformers' name for it ("full_attention", …), and its window.

    "dummy" is a layer that stores nothing: one without attention, or one that reads another's KV. In 5.17 a layer
    without attention is called "moe" or "mlp", the list ends before layers that read another's KV, and all windows
    of a model are one.

    Args:
        config: of the decoder (`get_text_config(decoder=True)`).
    """
    types, settings = cache_utils.get_layer_types_and_kwargs(config)
    settings = settings if isinstance(settings, list) else [settings] * len(types)
    kinds = []
    for name, given in zip(types, settings, strict=True):
        window = given.get("sliding_window") if name in ("sliding_attention", "chunked_attention") else None
        kinds.append(("dummy" if name in ("moe", "mlp") else name, window))
    return kinds


def empty_cache_layer() -> Any:
    """What stands in `Cache.layers` for a "dummy" layer."""
    dummy = getattr(cache_utils, "DummyLayer", None)
    return cache_utils.LinearAttentionLayer() if dummy is None else dummy()


def cropped_length(length: int, count: int) -> int:
    """Length of a cache of `length` tokens after `Cache.crop(count)`.

    0 or less removes `-count` tokens, in all versions. More is the new length in 5.17, and refused in 5.23; here
    it is the new length always.
    """
    return min(length, count) if count > 0 else max(length + count, 0)


def runs_in_step_with_others(model: Any) -> bool:
    """Whether `generate` would set `synced_gpus` by itself: the model's parameters are spread over processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def pipeline_arguments(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a text-generation pipeline's `_forward` would hand to `generate`, beside the inputs.

    Since 5.18 it adds the arguments of `pipeline(...)` and its own defaults to those `given`; before, it held them in
    a generation config of its own.
    """
    if hasattr(pipe, "_prepare_generate_kwargs"):
        return pipe._prepare_generate_kwargs(dict(given))
    return {"generation_config": pipe.generation_config} | given


def pipeline_own_arguments(pipe: Any) -> dict[str, Any]:
    """Arguments of `pipeline(...)` that its `_forward` adds to those of a call."""
    return getattr(pipe, "_generate_kwargs", {})


def spread_by_tensors(model: Any) -> bool:
    """Whether each process holds a part of every weight (`tp_plan`)."""
    return getattr(model, "_device_mesh", None) is not None
