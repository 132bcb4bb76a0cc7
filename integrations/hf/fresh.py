"""Attention over pages as one op of torch's, so that a compiler need not look into it.

Modelling code hands keys and values to its cache and what the cache gives back to its attention: here a `FreshView` of
the step's own, which the op stores before it attends. Which step that is, no argument can tell a compiled graph.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

from hf_paged.kernels import paged_attention, write_kv
from hf_paged.plan import StepPlan
from hf_paged.store import KVStore


class Running(threading.local):
    """What this thread's forward computes: the step's KV and plan; and, for notes, the window that each layer's
    attention asks for."""

    step: tuple[KVStore, StepPlan, dict[int, int | None]] | None = None


running = Running()

SCHEMA = (
    "attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, SymInt layer, float scale, int? window, "
    "float? softcap) -> Tensor"
)


@cache
def define() -> torch.library.Library:
    """`torch.ops.hf_paged.attend`. (It is there for as long as this is kept.)"""
    library = torch.library.Library("hf_paged", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("attend", _attend, "CompositeExplicitAutograd")
    torch.library.register_fake("hf_paged::attend", _shape, lib=library)
    return library


def _attend(query, key, value, sinks, layer, scale, window, softcap) -> torch.Tensor:
    """Store keys and values `[tokens, kv_heads, dim]` of the step that runs, attend over its pages."""
    store, plan, windows = running.step
    windows[layer] = window
    pages = store.keys[layer], store.values[layer]
    write_kv(key, value, *pages, plan.rows)
    options = dict(scale=scale, window=window, softcap=softcap, sinks=sinks, fresh=(key, value))
    return paged_attention(query, *pages, plan.rows, **options)


def _shape(query, key, value, sinks, layer, scale, window, softcap) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


class FreshView:
    """What the model's attention gets in place of its keys and values: those of the step's own tokens, `[tokens,
    kv_heads, dim]`."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> None:
        self.key, self.value, self.layer = key, value, layer

    def attend(self, query: torch.Tensor, *, scale: float, window: int | None, softcap: float | None, sinks):
        """See `hf_paged.kernels.paged_attention`."""
        return torch.ops.hf_paged.attend(query, self.key, self.value, sinks, self.layer, scale, window, softcap)
