"""Every fact about a version of transformers: 5.17 to 5.23 are supported."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils
from transformers.configuration_utils import PreTrainedConfig


def cache_layer_types(config: PreTrainedConfig) -> list[str]:
    """What the default cache stores for each layer, by transformers' names: "full_attention", "conv", ….

    "dummy" is a layer that stores nothing: one without attention, or one that reads another's KV. In 5.17 a layer
    without attention is called "moe" or "mlp", and the list ends before layers that read another's KV.

    Args:
        config: of the decoder (`get_text_config(decoder=True)`).
    """
    types = list(cache_utils.get_layer_types_and_kwargs(config)[0])
    return ["dummy" if name in ("moe", "mlp") else name for name in types]


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
