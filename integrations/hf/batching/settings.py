"""A `ContinuousBatchingConfig`, as the engine takes it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

logger = logging.getLogger("hf_paged")
# Of transformers' own loop, cache and graphs: they change no token, and there is nothing here that they could tune.
WITHOUT_EFFECT = {
    "max_blocks_per_request",
    "use_async_batching",
    "use_cuda_graph",
    "q_padding_interval_size",
    "kv_padding_interval_size",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
    "use_default_compile_configs",
    "max_cached_graphs",
    "scheduler_type",
    "safety_margin",
    "auto_switch_to_flash",
    "cpu_offload_space_safety_threshold",
    "drop_unsupported_processors",
    "disable_nccl_graph_mixing",
    "cpu_group_timeout",
}
# Their names, and those of `EngineConfig`.
SAME = {
    "max_batch_tokens": "max_batch_tokens",
    "max_memory_percent": "memory_fraction",
    "max_requests_per_batch": "max_sequences",
    "allow_block_sharing": "prefix_caching",
}
TOKENS_A_BLOCK = 256


@dataclass(frozen=True)
class BatchSettings:
    """What a manager's configuration amounts to.

    Attributes:
        engine: fields of `EngineConfig` that it sets.
        max_queue_size: requests that may wait to be taken in; 0: any number.
        return_logprobs: log-probabilities of tokens are in the results.
        seed: from which those of requests derive; None: drawn from torch's generator.
        per_request_processors: requests may have a temperature, top_k and top_p of their own.
    """

    engine: dict[str, Any]
    max_queue_size: int
    return_logprobs: bool
    seed: int | None
    per_request_processors: bool


def read_settings(given: Any, page_size: int) -> BatchSettings:
    """Every field is honoured, refused by name, or named in a warning where it has nothing to tune here.

    Args:
        given: a `ContinuousBatchingConfig`.
        page_size: the engine's, where `given` does not say.

    Raises:
        ValueError: a field that is not allowed here.
    """
    default = type(given)()
    changed = {f.name: getattr(given, f.name) for f in fields(given)}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    engine = {ours: changed.pop(name) for name, ours in SAME.items() if name in changed}
    engine |= _pages(changed, page_size)
    space = changed.pop("cpu_offload_space", 0.0)
    if space is None:
        raise ValueError("cpu_offload_space=None is not allowed: a number of GiB")
    if space:
        engine["host_cache_bytes"] = int(space * (1 << 30))
    named = ("max_queue_size", "return_logprobs", "seed", "per_request_processors")
    own = {name: changed.pop(name, getattr(default, name)) for name in named}
    unknown = changed.keys() - WITHOUT_EFFECT
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: not known to this engine; leave them at their defaults")
    if changed:
        logger.warning("of transformers' own loop, and of no effect here: %s", ", ".join(sorted(changed)))
    return BatchSettings(engine, **own)


def _pages(changed: dict[str, Any], page_size: int) -> dict[str, int]:
    """Size and number of pages; takes what it has read out of `changed`. 5.17 calls a page's size `block_size`."""
    sizes = [changed.pop(name, None) for name in ("page_size", "block_size")]
    size = next((size for size in sizes if size is not None), None)
    blocks = changed.pop("num_blocks", None)
    made = {} if size is None else {"page_size": size}
    if blocks is not None:
        made["num_pages"] = max(blocks * (size or TOKENS_A_BLOCK) // (size or page_size), 1)
    return made
