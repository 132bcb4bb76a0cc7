"""What an engine takes for a model: pages of its pool, and limits, from the settings and the model's facts."""

from __future__ import annotations

import torch

from hf_paged.config import CoreSettings, EngineConfig, available_memory
from hf_paged.integrations.inspect import ModelFacts
from hf_paged.store import KVStore


def pool_pages(config: EngineConfig, facts: ModelFacts) -> int:
    """Pages of the pool: as asked, or what the memory fraction holds."""
    if config.num_pages is not None:
        return config.num_pages
    page = KVStore.page_bytes(list(facts.layers), config.page_size, facts.dtype)
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
    )
