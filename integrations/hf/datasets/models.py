"""The engine of a run, from whatever names a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.pool import pages_for
from hf_paged.integrations.datasets.recipe import Ingest, Recipe
from hf_paged.integrations.datasets.source import Source
from hf_paged.integrations.validity import name_of


@dataclass
class Served:
    """An engine and what its model is called. `identity` names the weights, in any process."""

    engine: Any
    name: str
    identity: str
    own: bool

    def close(self) -> None:
        """Close the engine, unless it is the caller's."""
        if self.own:
            self.engine.close()


def serve(
    model: Any,
    tokenizer: Any,
    draft: Any,
    speculation: Any,
    dtype: str | None,
    device: str | None,
    recipe: Recipe,
    source: Source,
    settings: dict[str, Any],
) -> Served:
    """An engine for a run; see `generate_dataset` for the arguments.

    Raises:
        BadInput: a model cannot be loaded or driven, or arguments do not go together.
    """
    from hf_paged import Engine
    from hf_paged.integrations.bench.models import check_device, load

    if isinstance(model, Engine):
        given = {"tokenizer": tokenizer, "draft_model": draft, "speculation": speculation} | settings
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise BadInput(f"{', '.join(extra)}: the engine that is given has its own; leave them out")
        return Served(model, _name(model.target()), name_of(model.target()), False)
    dtype = dtype or ("float32" if check_device(device).type == "cpu" else "auto")
    name = str(model) if isinstance(model, str) or hasattr(model, "__fspath__") else None
    if name is not None or model is None:
        loaded = load(name, dtype, device)
        name, model, tokenizer = loaded.name, loaded.model, tokenizer or loaded.tokenizer
    draft_tokenizer = None
    if isinstance(draft, str) or hasattr(draft, "__fspath__"):
        loaded = load(str(draft), dtype, device)
        draft, draft_tokenizer = loaded.model, loaded.tokenizer
    known = name_of(model)
    try:
        if model.device.type == "cpu" and not {"num_pages", "memory_fraction"} & set(settings):
            settings = settings | {"num_pages": _pages(model, tokenizer, recipe, source, settings)}
        engine = Engine(
            model,
            tokenizer=tokenizer,
            draft_model=draft,
            draft_tokenizer=draft_tokenizer,
            speculation=speculation,
            **settings,
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    return Served(engine, name or _name(model), known, True)


def _pages(model: Any, tokenizer: Any, recipe: Recipe, source: Source, settings: dict[str, Any]) -> int:
    """Pages for the rows that run at once, judged by the first rows; at most what the engine would take itself."""
    from hf_paged.config import EngineConfig
    from hf_paged.integrations.inspect import model_facts
    from hf_paged.integrations.sizing import core_settings, pool_pages

    config, facts = EngineConfig.from_dict(settings), model_facts(model)
    longest = core_settings(config, facts).max_model_len
    ingest = Ingest(recipe, tokenizer, longest, config.page_size)
    prompts = [ready.ids for ready in ingest(list(enumerate(source.sample))) if ready.error is None]
    wanted = pages_for(prompts, config.max_sequences, recipe.sampling.max_tokens, config.page_size, longest)
    return min(wanted, pool_pages(config, facts))


def _name(model: Any) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__
