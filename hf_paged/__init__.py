"""hf_paged: transformers' `generate` over paged KV memory, with continuous batching.

Names are imported when they are first used, so that `import hf_paged` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "EngineConfig": "hf_paged.config",
    "SpeculationConfig": "hf_paged.speculation.config",
    "SamplingParams": "hf_paged.params",
    "CompletionOutput": "hf_paged.outputs",
    "RequestMetrics": "hf_paged.outputs",
    "RequestOutput": "hf_paged.outputs",
    "Score": "hf_paged.outputs",
    "TokenEvent": "hf_paged.outputs",
    "TokenLogprob": "hf_paged.outputs",
    "EngineStats": "hf_paged.stats",
    "Engine": "hf_paged.integrations.engine",
    "PagedCache": "hf_paged.integrations.cache",
    "enable": "hf_paged.integrations.doors",
    "disable": "hf_paged.integrations.doors",
    "generate": "hf_paged.integrations.generate",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
