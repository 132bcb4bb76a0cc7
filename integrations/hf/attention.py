"""The seam with modelling code: keys and values go to pages, attention reads them there.

`AttentionInterface` and `AttentionMaskInterface` take functions by name for the whole process. A name is registered per
implementation that it stands over (`hf_paged_over_sdpa`, ...): called with ordinary tensors, by whoever uses the model
in another thread meanwhile, it does what that implementation does.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer

from hf_paged.integrations.compiled import CompiledCall
from hf_paged.integrations.fresh import FreshView, define, running
from hf_paged.integrations.modules import Momentary, configs_of, modules_of
from hf_paged.plan import StepPlan
from hf_paged.store import KVStore

PREFIX = "hf_paged_over_"
# What modelling code hands to attention that pages honour, or that attention does not look at.
KNOWN_TENSORS = ("s_aux", "position_ids", "cache_position", "position_embeddings")


class CannotDrive(ValueError):
    """The engine cannot run this model's attention over pages; transformers' own loop can."""


class StepCache(Cache):
    """The cache object of one packed forward: hands a step's keys and values on to attention, which stores them."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keys and values `[1, kv_heads, tokens, dim]`, as views of a step's."""
        view = FreshView(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), layer_idx)
        return view, view

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False


def _over(implementation: str, original: Callable) -> Callable:
    """Attention for `AttentionInterface`: over pages where it is given any, else `original`."""
    # PyTorch's has neither, and transformers leaves them out there (Gemma 2 in 5.17): so it must be here.
    full = implementation != "sdpa"

    def attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
        if not isinstance(key, FreshView):
            return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        for argument, value in kwargs.items():  # a bias, a choice of tokens, …
            if isinstance(value, torch.Tensor) and argument not in KNOWN_TENSORS:
                raise CannotDrive(f"its attention takes {argument}")
        out = key.attend(
            query[0].transpose(0, 1),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap") if full else None,
            sinks=kwargs.get("s_aux") if full else None,
        )
        return out[None], None

    return attention


def _eager(module, *args, **kwargs):
    """The eager attention of whichever modelling file `module` comes from."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _register(implementation: str) -> str:
    """Name under which paged attention over `implementation` is registered."""
    name = f"{PREFIX}{implementation}"
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if name not in functions:
        AttentionInterface.register(name, _over(implementation, functions.get(implementation, _eager)))
        if implementation in masks:
            AttentionMaskInterface.register(name, masks[implementation])
    return name


# One switch at a time for each model, whichever engines it has. (Weak, and no setting.)
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def switch_lock(model: nn.Module) -> threading.RLock:
    """Held by whoever changes the model for a moment: its attention, or whether its modules train."""
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


class Evaluation(Momentary):
    """The model's modules in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_of(model)
        self.training = [module for module in self.modules if module.training]

    def _change(self) -> None:
        for module in self.training:
            module.training = False

    def _restore(self) -> None:
        for module in self.training:
            module.training = True


class Switch(Evaluation):
    """The same, with the model's attention turned to the pages of a step (see `Running`)."""

    def __init__(self, model: nn.Module, step: tuple[KVStore, StepPlan, dict[int, int | None]]) -> None:
        super().__init__(model)
        self.step, self.outer = step, running.step
        self.before = [(config, config._attn_implementation_internal) for config in configs_of(self.modules)]

    def _change(self) -> None:
        for config, implementation in self.before:
            config._attn_implementation_internal = _register((implementation or "eager").removeprefix(PREFIX))
        running.step = self.step
        super()._change()

    def _restore(self) -> None:
        for config, implementation in self.before:
            config._attn_implementation_internal = implementation
        running.step = self.outer
        super()._restore()


class ModuleForward:
    """Plan → logits through the model's own forward, for any model that calls the attention interface.

    Args:
        model: function that gives the model (so that an engine need not keep it alive).
        store: KV of the model.
        compiled: calls the model; None: nobody but this.

    Attributes:
        windows: sliding window by layer, as the model's attention asked for it last (None: it sees everything).
    """

    def __init__(self, model: Callable[[], nn.Module], store: KVStore, compiled: CompiledCall | None = None) -> None:
        self.model, self.store, self.compiled = model, store, compiled
        self.windows: dict[int, int | None] = {}
        define()

    @torch.no_grad()
    def __call__(self, plan: StepPlan) -> torch.Tensor:
        """Logits behind the tokens that the plan names: float32 `[len(plan.logits_at), vocab]`."""
        model = self.model()
        tokens, wanted = plan.token_ids[None], plan.logits_at
        if self.compiled is not None and len(wanted) < 2:  # none and one would be a graph each
            wanted = wanted.repeat(2) if len(wanted) else tokens.new_zeros(2)
        with switch_lock(model), Switch(model, (self.store, plan, self.windows)) as moment, moment:
            inputs = dict(
                input_ids=tokens,
                position_ids=plan.positions[None],
                # With four axes it is taken as made: modelling code makes none.
                attention_mask=tokens.new_zeros(1, 1, 1, 1),
                past_key_values=StepCache(len(self.store.layers)),
                use_cache=True,
                logits_to_keep=wanted,
                return_dict=True,
            )
            out = model(**inputs) if self.compiled is None else self.compiled(model, inputs)
        logits = out.logits[0]
        if logits.shape[0] != len(wanted):  # a model that takes only a count
            logits = logits[wanted]
        return logits[: len(plan.logits_at)].float()
