"""What an engine takes for a model: pages of its pool, and limits, from the settings and the model's facts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_paged.config import CoreSettings, EngineConfig, available_memory, require
from hf_paged.integrations.inspect import ModelFacts
from hf_paged.kernels.fp8 import FP8
from hf_paged.store import KVStore
from hf_paged.tier_disk import DiskTier
from hf_paged.tier_host import HostTier
from hf_paged.tiers import Tier

# Numbers in the logits behind tokens of prompts that one step may hold: 128 MB and 1 GB in float32.
LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}


def kv_dtype(config: EngineConfig, facts: ModelFacts) -> torch.dtype:
    """Of the numbers in the pool's pages."""
    return FP8 if config.kv_dtype == "fp8" else facts.dtype


def pool_pages(config: EngineConfig, facts: ModelFacts) -> int:
    """Pages of the pool: as asked, or what the memory fraction holds."""
    if config.num_pages is not None:
        return config.num_pages
    page = KVStore.page_bytes(list(facts.layers), config.page_size, kv_dtype(config, facts))
    if facts.device.type == "cuda":
        free, fraction = torch.cuda.mem_get_info(facts.device)[0], config.memory_fraction or 0.8
    else:
        free, fraction = available_memory(), config.memory_fraction or 0.4
    return max(int(free * fraction) // page, 1)


def core_settings(config: EngineConfig, facts: ModelFacts) -> CoreSettings:
    """Settings with every default decided."""
    return CoreSettings(
        max_batch_tokens=config.max_batch_tokens or (512 if facts.device.type == "cpu" else 8192),
        max_sequences=config.max_sequences,
        max_model_len=min(config.max_model_len or facts.max_positions or 1 << 60, facts.steady_length or 1 << 60),
        vocab_size=facts.vocab_size,
        eos_ids=facts.eos_ids,
        check=config.check,
        backend=config.backend,
        prefix_caching=config.prefix_caching,
        track_optimum=config.track_optimum,
        max_logits=max(LOGITS.get(facts.device.type, LOGITS["cuda"]) // facts.vocab_size, 1),
    )


def make_tiers(config: EngineConfig, facts: ModelFacts, store: KVStore, identity: Callable[[], str]) -> list[Tier]:
    """Where pages go that the prefix cache has no room for any more, the fastest first.

    Raises:
        ValueError: a tier is asked for that cannot be.
    """
    tiers: list[Tier] = []
    for name, asked in (("host_cache_bytes", config.host_cache_bytes), ("disk_cache", config.disk_cache)):
        require(not asked or config.prefix_caching, name, asked, "prefix_caching is False, so that nothing is kept")
    if config.host_cache_bytes:
        wrong = "the model's own KV is in host memory: give its pool more room (memory_fraction, num_pages)"
        require(facts.device.type != "cpu", "host_cache_bytes", config.host_cache_bytes, wrong)
        tiers.append(HostTier(store, config.host_cache_bytes))
    if config.disk_cache is not None:
        tiers.append(DiskTier(store, config.disk_cache, config.disk_cache_bytes, identity()))
    return tiers
