"""A model over a whole dataset: streamed in, batched continuously, written crash-safe."""

from importlib import import_module

_EXPORTS = {
    "generate_dataset": "job",
    "Interrupted": "job",
    "Shard": "shard",
    "Recipe": "recipe",
    "Template": "template",
    "Runner": "runner",
    "Source": "source",
    "open_source": "source",
    "OutputDirectory": "directory",
    "read_rows": "directory",
    "plot_summary": "plot",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
