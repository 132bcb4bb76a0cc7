"""`PagedCache`: paged KV storage for transformers' own loop, whatever the strategy and the attention."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_paged.integrations.cache_layers import PagedLayer
from hf_paged.integrations.cache_tables import CacheFull, PageTables
from hf_paged.integrations.compat import cache_layer_kinds, cropped_length, empty_cache_layer
from hf_paged.memory import Memory

PAGED_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def pageable(config: PreTrainedConfig) -> str | None:
    """Why a model of this config cannot keep its KV in a `PagedCache`; None: it can."""
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"config={config!r} is not allowed: a transformers config, as `model.config`")
    decoder = config.get_text_config(decoder=True)
    try:
        types = [name for name, _ in cache_layer_kinds(decoder)]
    except (AttributeError, KeyError, TypeError) as error:
        return f"transformers cannot tell what the layers of model type {config.model_type!r} store ({error})"
    odd = sorted(set(types) - {*PAGED_TYPES, "dummy"})
    if odd:
        stored = ", ".join(odd)
        return f"model type {config.model_type!r} has layers that store more than keys and values: {stored}"
    for known in (config, decoder):
        # A model may keep a state of its own under layer types that look like attention (RWKV, XLNet, …).
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(known), None)
        model_class = found[0] if isinstance(found, tuple) else found
        if model_class is None:
            continue
        if getattr(model_class, "_is_stateful", False) or not model_class._supports_default_dynamic_cache():
            return f"model type {config.model_type!r} keeps a state of its own, not keys and values"
        if "past_key_values" not in inspect.signature(model_class.forward).parameters:
            return f"model type {config.model_type!r} takes no past_key_values"
    return None


def paged_cache_for(model: PreTrainedModel, page_size: int = 16, num_pages: int | None = None) -> Cache:
    """An empty cache that `model.generate(..., past_key_values=...)` takes.

    Returns:
        a `PagedCache`; for an encoder-decoder, an `EncoderDecoderCache` whose self-attention is one.
    Raises:
        ValueError: the model cannot page (see `pageable`), or an argument is not allowed.
    """
    cache = PagedCache(model.config, page_size, num_pages)
    if getattr(model.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
    return cache


class PagedCache(DynamicCache):
    """Keys and values in pages that rows share, given to the model as the dense tensors of a `DynamicCache`.

    `model.generate(..., past_key_values=PagedCache(model.config))` works with every strategy. Beams share all
    pages but their last; reordering them changes page tables and copies no KV, but for a shared last page when it
    is next written. Memory grows as used. (It is a `DynamicCache` by name only, for code that asks for one before
    it crops or repeats.)

    Args:
        config: `model.config`.
        page_size: tokens a page, 1 to 256.
        num_pages: limit, over all rows. None: none.
    Raises:
        ValueError: an argument is not allowed, or the model has layers that store more than keys and values.
    """

    def __init__(self, config: PreTrainedConfig, page_size: int = 16, num_pages: int | None = None) -> None:
        if isinstance(page_size, bool) or not isinstance(page_size, int) or not 1 <= page_size <= 256:
            raise ValueError(f"page_size={page_size!r} is not allowed: 1 to 256")
        if num_pages is not None and (isinstance(num_pages, bool) or not isinstance(num_pages, int) or num_pages < 1):
            raise ValueError(f"num_pages={num_pages!r} is not allowed: None, or at least 1")
        reason = pageable(config)
        if reason is not None:
            raise ValueError(f"a PagedCache cannot be made: {reason}")
        self.tables = PageTables(page_size, num_pages)
        kinds = cache_layer_kinds(config.get_text_config(decoder=True))
        layers = [empty_cache_layer() if name == "dummy" else PagedLayer(self.tables, window) for name, window in kinds]
        self.tables.layers = [layer for layer in layers if isinstance(layer, PagedLayer)]
        Cache.__init__(self, layers=layers)

    def __repr__(self) -> str:
        rows, length = len(self.tables.rows), self.tables.length
        pages = f"pages={self.memory.pool.used}, page_size={self.page_size}"
        return f"{type(self).__name__}(rows={rows}, length={length}, {pages})"

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.tables.page_size

    @property
    def memory(self) -> Memory:
        """The `Memory` that holds the page tables, a sequence a row."""
        return self.tables.memory

    @property
    def batch_size(self) -> int:
        """Rows; -1 where nothing is stored yet."""
        return len(self.tables.rows) or -1

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages in use, over all layers."""
        return self.memory.pool.used * sum(layer.page_bytes for layer in self.tables.layers)

    def waste(self) -> float:
        """Share of the slots of pages in use that hold no token, 0 to 1."""
        return self.memory.waste()

    def check(self) -> None:
        """Verify every law of pages, page tables and layers.

        Raises:
            AssertionError: one does not hold.
        """
        self.tables.check()

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no layer has a maximum length (the limit `num_pages` is one over all rows)."""
        return self.get_max_length(layer_idx)

    def reset(self) -> None:
        """Forget everything, release all pages and free the tensors. The cache can then take any batch."""
        self.tables.clear()
        for layer in self.tables.layers:
            layer.forget()

    close = reset

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every row and release the pages that nothing needs. Copies nothing.

        Args:
            tokens_to_remove: 0 or less: remove `-tokens_to_remove` tokens. More: keep that many.
        """
        for layer in self.tables.layers:
            layer.length = cropped_length(layer.length, tokens_to_remove)
        self.tables.crop(max((layer.length for layer in self.tables.layers), default=0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i what row `beam_idx[i]` was. Copies no KV: rows share pages.

        Args:
            beam_idx: int64 `[new rows]`.
        """
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times. Copies no KV: rows share pages."""
        self._select(torch.arange(len(self.tables.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (int64, or a bool for each row) and release the others' pages."""
        self._select(indices)

    def _select(self, indices: torch.Tensor) -> None:
        if self.tables.length:
            indices = indices.cpu() if isinstance(indices, torch.Tensor) else indices
            self.tables.select(torch.arange(len(self.tables.rows))[indices].reshape(-1).tolist())


__all__ = ["CacheFull", "PagedCache", "PagedLayer", "pageable", "paged_cache_for"]
