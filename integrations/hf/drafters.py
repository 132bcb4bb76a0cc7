"""Draft models: whether one fits its target, and what drafts with it."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_paged.config import require
from hf_paged.integrations.inspect import PagedForward, model_facts, verify_forward
from hf_paged.integrations.lean import LeanForward
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.draft_model import DraftModel
from hf_paged.store import KVStore

if TYPE_CHECKING:
    from hf_paged.integrations.engine import Engine

logger = logging.getLogger("hf_paged")


def speculation_settings(
    given: SpeculationConfig | dict[str, Any] | str | None, draft_model: nn.Module | None
) -> SpeculationConfig | None:
    """Settings from whatever the caller gave; a draft model alone asks for `draft`.

    Raises:
        ValueError: a bad setting, or `draft` without a draft model.
    """
    if given is None:
        given = {"method": "draft"} if draft_model is not None else {"method": "off"}
    if isinstance(given, str):
        given = {"method": given}
    if isinstance(given, dict):
        given = SpeculationConfig.from_dict(given)
    if not isinstance(given, SpeculationConfig):
        raise ValueError(
            f"speculation={given!r} is not allowed: a SpeculationConfig, a dict of its fields, or a method"
        )
    if draft_model is not None and not isinstance(draft_model, nn.Module):
        raise ValueError(f"draft_model={type(draft_model).__name__}: must be a causal language model of transformers")
    wrong = given.method == "draft" and draft_model is None
    require(not wrong, "method", "draft", "it needs a draft_model", "SpeculationConfig")
    return None if given.off else given


def make_drafter(
    engine: Engine, config: SpeculationConfig, draft_model: nn.Module | None, known: dict[Any, DraftModel]
) -> DraftModel | None:
    """What drafts beside texts: the draft model, the target's first layers, or nothing.

    Args:
        known: drafters that were made before, by what they were made of.
    """
    if config.method in ("lookup", "suffix"):
        return None
    if config.method == "layer_skip":
        key, make = config.early_exit, _layer_skip
    elif draft_model is None:
        return None
    else:
        key, make = weakref.ref(draft_model), _draft_model
    if key not in known:
        known[key] = make(engine, key)
    return known[key]


def _draft_model(engine: Engine, ref: weakref.ref[nn.Module]) -> DraftModel:
    draft, facts = ref(), engine.facts
    check_draft(draft, engine)
    own = model_facts(draft)
    verify_forward(draft, own)
    pages, size = engine.store.num_pages, engine.config.page_size
    store = KVStore(list(own.layers), pages, size, own.dtype, own.device)
    forward = PagedForward(ref, store, engine.config.backend)
    settings = engine.core.settings
    return DraftModel(
        forward, store, pages, size, device=facts.device, backend=settings.backend, most=settings.max_batch_tokens
    )


def _layer_skip(engine: Engine, layers: int) -> DraftModel:
    forward, total = EarlyExit(engine, layers), len(engine.facts.layers)
    require(
        layers < total, "early_exit", layers, f"1 to {total - 1}, fewer than the model's layers", "SpeculationConfig"
    )
    settings = engine.core.settings
    return DraftModel(
        forward,
        None,
        engine.store.num_pages,
        engine.config.page_size,
        name="layer_skip",
        device=engine.facts.device,
        backend=settings.backend,
        most=settings.max_batch_tokens,
    )


class EarlyExit:
    """Plan → logits of the target's first layers, its norm and its head; their KV is the target's own.

    After Elhoushi et al., "LayerSkip", ACL 2024.
    """

    def __init__(self, engine: Engine, layers: int) -> None:
        self.engine, self.layers = engine, layers
        self.refresh()

    def refresh(self) -> None:
        """Look at the model again."""
        model = self.engine.target()
        self.lean = LeanForward.build(model, self.engine.store, self.engine.config.backend)
        if self.lean is not None:
            self.lean.layers = self.lean.layers[: self.layers]

    def __call__(self, plan) -> torch.Tensor:
        if self.lean is not None:
            self.lean.ops = getattr(self.engine.forward.run, "ops", self.lean.ops)  # copies of weights, if it has any
            return self.lean(plan)
        model = self.engine.target()
        config = model.config.get_text_config(decoder=True)
        before = config.num_hidden_layers
        try:  # modelling code goes through as many layers as its config says
            config.num_hidden_layers = self.layers
            return self.engine.forward.run(plan)
        finally:
            config.num_hidden_layers = before


def check_draft(draft: nn.Module, engine: Engine) -> None:
    """Whether `draft` can draft for the engine's model.

    Raises:
        ValueError: it is no causal model, or has another vocabulary, or is on another device.
    """
    target, name = engine.target(), type(draft).__name__
    if not hasattr(draft, "get_input_embeddings"):
        raise ValueError(f"draft_model={name}: must be a causal language model of transformers")
    own, facts = draft.get_input_embeddings().weight, engine.facts
    if own.shape[0] != facts.vocab_size:
        raise ValueError(
            f"draft_model={name} has a vocabulary of {own.shape[0]} tokens, the model one of {facts.vocab_size}: they "
            "must share one (or give tokenizer and assistant_tokenizer to generate)"
        )
    if own.device != facts.device:
        raise ValueError(f"draft_model={name} is on {own.device}, the model on {facts.device}: move it there")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (draft, target)]
    if sizes[0] >= sizes[1]:
        logger.warning("draft_model=%s has %d parameters, the model %d: drafting with it can hardly pay", name, *sizes)
