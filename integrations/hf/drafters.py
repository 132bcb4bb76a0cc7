"""Draft models: whether one fits its target, and what drafts with it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_paged.config import require
from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.inspect import ModelFacts, PagedForward, model_facts, verify_forward
from hf_paged.integrations.lean import LeanForward
from hf_paged.integrations.validity import Validity
from hf_paged.integrations.vocabularies import Pair, same_vocabulary, vocabularies
from hf_paged.kernels.native_blocks import FewModel
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.draft_model import DraftModel
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.universal import UniversalDraft
from hf_paged.store import KVStore

if TYPE_CHECKING:
    from hf_paged.integrations.model_engine import ModelEngine

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
    engine: ModelEngine,
    config: SpeculationConfig,
    draft_model: nn.Module | None,
    tokenizers: Pair | None,
    known: dict[Any, tuple[Pair | None, Drafter]],
) -> Drafter | None:
    """What drafts beside texts: the draft model, the target's first layers, or nothing.

    Args:
        tokenizers: the target's and the draft model's, where they may differ.
        known: drafters that were made before, by what they were made of, and the tokenizers.
    """
    if config.method in ("lookup", "suffix"):
        return None
    if config.method == "layer_skip":
        if config.early_exit not in known:
            known[config.early_exit] = None, _layer_skip(engine, config.early_exit)
        return known[config.early_exit][1]
    if draft_model is None:
        return None
    key = weakref.ref(draft_model)
    made_for, drafter = known.get(key, (None, None))
    if drafter is not None and made_for == tokenizers:
        return drafter
    check_draft(draft_model, engine)
    if tokenizers is None or same_vocabulary(tokenizers):
        if tokenizers is None:
            check_vocabulary(draft_model, engine)
        made = drafter if isinstance(drafter, DraftModel) else _draft_model(engine, key)
    else:
        made = _universal_draft(engine, key, tokenizers)
    if drafter not in (None, made):
        engine.core.drafting.drop(drafter)
    known[key] = tokenizers, made
    return made


def _size(draft: nn.Module) -> int:
    return draft.get_input_embeddings().weight.shape[0]


def _draft_model(engine: ModelEngine, ref: weakref.ref[nn.Module]) -> DraftModel:
    own = _facts_of(ref())
    forward, store = _own_forward(engine, ref, own)
    # One vocabulary may be padded to two sizes: no token has an id that only one of them takes.
    sizes = (engine.facts.vocab_size, own.vocab_size) if own.vocab_size != engine.facts.vocab_size else None
    settings = _common_settings(engine) | {"longest": _longest(own), "sizes": sizes}
    return DraftModel(forward, store, store.num_pages, store.page_size, **settings)


def _universal_draft(engine: ModelEngine, ref: weakref.ref[nn.Module], tokenizers: Pair) -> UniversalDraft:
    own = _facts_of(ref())
    forward, store = _own_forward(engine, ref, own)
    target, draft = vocabularies(tokenizers, (engine.facts.vocab_size, own.vocab_size))
    return UniversalDraft(forward, store, target, draft, longest=_longest(own), **_common_settings(engine))


def _facts_of(draft: nn.Module) -> ModelFacts:
    """Facts of a draft model that can be driven.

    Raises:
        CannotDrive: it cannot.
    """
    try:
        own = model_facts(draft)
        verify_forward(draft, own)
    except CannotDrive as error:
        raise CannotDrive(f"draft_model={type(draft).__name__} cannot draft: {error}") from error
    return own


def _longest(own: ModelFacts) -> int:
    """Tokens that a draft model can take."""
    return min(own.max_positions or 1 << 60, own.steady_length or 1 << 60)


def _own_forward(engine: ModelEngine, ref: weakref.ref[nn.Module], own: ModelFacts) -> tuple[DraftForward, KVStore]:
    """A draft model's forward, over as many pages as the target has."""
    store = KVStore(list(own.layers), engine.store.num_pages, engine.config.page_size, own.dtype, own.device)
    return DraftForward(ref, store, engine.config.backend, pack=engine.config.pack_weights), store


class DraftForward(PagedForward):
    """A draft model's forward, which knows whether the model is what it was."""

    def __init__(self, model: Callable[[], nn.Module], *args: Any, **settings: Any) -> None:
        self.validity = Validity(model)
        super().__init__(model, *args, **settings)

    def altered(self) -> bool:
        """Whether a bare look tells that the model is not what it was: all but numbers that were written uncounted, of
        which it reads a few."""
        return self.validity.glance() or self.validity.step()

    def refresh(self, anew: bool = False, known: object | None = None) -> bool:
        """Look at the model. Returns whether KV that was stored is void."""
        changed = self.validity.begin()
        changed = super().refresh(anew=anew or changed, known=self.validity.known) or changed
        self.validity.stale = False
        self.validity.rest()
        return changed


def _common_settings(engine: ModelEngine) -> dict[str, Any]:
    settings = engine.core.settings
    return {"device": engine.facts.device, "backend": settings.backend, "most": settings.max_batch_tokens}


def _layer_skip(engine: ModelEngine, layers: int) -> DraftModel:
    forward, total = EarlyExit(engine, layers), len(engine.facts.layers)
    require(
        layers < total, "early_exit", layers, f"1 to {total - 1}, fewer than the model's layers", "SpeculationConfig"
    )
    sizes = engine.store.num_pages, engine.config.page_size
    return DraftModel(forward, None, *sizes, name="layer_skip", **_common_settings(engine))


class EarlyExit:
    """Plan → logits of the target's first layers, its norm and its head; their KV is the target's own.

    After Elhoushi et al., "LayerSkip", ACL 2024.
    """

    def __init__(self, engine: ModelEngine, layers: int) -> None:
        self.engine, self.layers = engine, layers
        self.refresh()

    def refresh(self) -> None:
        """Look at the model again."""
        model = self.engine.target()
        self.lean = LeanForward.build(model, self.engine.store, self.engine.config.backend, pack=False)
        if self.lean is not None:
            self.lean.layers = self.lean.layers[: self.layers]
            self.lean.lender = lambda: self.engine.forward.run

    def few_model(self) -> FewModel | None:
        """See `LeanForward.few_model`."""
        return self.lean.few_model() if self.lean is not None else None

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


def check_draft(draft: nn.Module, engine: ModelEngine) -> None:
    """Whether `draft` can draft for the engine's model.

    Raises:
        ValueError: it is no causal model, or is on another device.
    """
    target, name = engine.target(), type(draft).__name__
    if not hasattr(draft, "get_input_embeddings"):
        raise ValueError(f"draft_model={name}: must be a causal language model of transformers")
    own, facts = draft.get_input_embeddings().weight, engine.facts
    if own.device != facts.device:
        raise ValueError(f"draft_model={name} is on {own.device}, the model on {facts.device}: move it there")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (draft, target)]
    if sizes[0] >= sizes[1]:
        logger.warning("draft_model=%s has %d parameters, the model %d: drafting with it can hardly pay", name, *sizes)


def check_vocabulary(draft: nn.Module, engine: ModelEngine) -> None:
    """Whether `draft` has as many tokens as the engine's model.

    Raises:
        ValueError: it has not.
    """
    if _size(draft) != engine.facts.vocab_size:
        raise ValueError(
            f"draft_model={type(draft).__name__} has a vocabulary of {_size(draft)} tokens, the model one of "
            f"{engine.facts.vocab_size}: they must share one, or both tokenizers must be given (tokenizer and "
            "assistant_tokenizer to generate, tokenizer and draft_tokenizer to an Engine)"
        )
