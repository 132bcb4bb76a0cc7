"""What `enable` puts in place of transformers' batch API: the same functions over `BatchingManager`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, GenerationMixin
from transformers.generation.continuous_batching.requests import GenerationOutput

from hf_paged.integrations.batching.manager import BatchingManager
from hf_paged.integrations.compat import runs_in_step_with_others, spread_by_tensors

logger = logging.getLogger("hf_paged")
Original = Callable[..., Any]


def _init(original: Original, settings: dict[str, Any]) -> Original:
    def init_continuous_batching(
        self: nn.Module,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
    ) -> Any:
        if _spread(self):
            return original(self, generation_config, continuous_batching_config, workload_hints)
        config = self.generation_config if generation_config is None else generation_config
        if config is None:
            raise ValueError("A GenerationConfig must be provided or set in the model.")
        if continuous_batching_config is None:
            continuous_batching_config = getattr(config, "continuous_batching_config", None)
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if isinstance(kept, BatchingManager):
            return _reused(kept, generation_config, continuous_batching_config)
        generate = getattr(GenerationMixin.generate, "_hf_paged_original", GenerationMixin.generate)
        made = continuous_batching_config or ContinuousBatchingConfig()
        return BatchingManager(self, copy.deepcopy(config), made, original=generate, settings=settings)

    return init_continuous_batching


def _spread(model: nn.Module) -> bool:
    """Whether the model's processes must agree on every batch, which transformers' own manager sees to."""
    spread = spread_by_tensors(model) or runs_in_step_with_others(model)
    if spread:
        logger.info("transformers' own continuous batching runs: the model is spread over processes")
    return spread


def _reused(kept: BatchingManager, generation_config: Any, batching_config: Any) -> BatchingManager:
    """The manager that was kept at the model, with these settings.

    Raises:
        ValueError: it was made for others, which it cannot change.
    """
    if batching_config is not None and batching_config != kept.continuous_batching_config:
        raise ValueError(
            "continuous_batching_config is not that of the manager which was kept at the model: call "
            "`model.destroy_cached_continuous_batching_manager()` first"
        )
    if generation_config is not None:
        kept.use(copy.deepcopy(generation_config))
    return kept


def _destroy(original: Original, settings: dict[str, Any]) -> Original:
    def destroy_cached_continuous_batching_manager(self: nn.Module) -> None:
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if isinstance(kept, BatchingManager):
            kept.destroy()
            del self._cached_continuous_batching_manager
        else:
            original(self)

    return destroy_cached_continuous_batching_manager


def _context(original: Original, settings: dict[str, Any]) -> Original:
    def continuous_batching_context_manager(
        self: nn.Module,
        generation_config: Any = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: Any = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: Any = None,
    ) -> AbstractContextManager[Any]:
        if _spread(self):
            stop = (block, timeout, continuous_batching_config, persistent_manager, warmup, workload_hints)
            return original(self, generation_config, *stop)
        manager = self.init_continuous_batching(generation_config, continuous_batching_config, workload_hints)
        return _running(manager, block, timeout, persistent_manager, warmup)

    return continuous_batching_context_manager


@contextmanager
def _running(manager: Any, block: bool, timeout: float | None, kept: bool, warmup: bool) -> Iterator[Any]:
    if warmup and not manager.warmed_up:
        manager.warmup()
    manager.start()
    failed = True
    try:
        yield manager
        failed = False
    finally:  # after an exception nobody waits for what is left
        manager.stop(block, timeout, keep_for_next_session=kept, hard_stop=failed)


def _batch(original: Original, settings: dict[str, Any]) -> Original:
    def generate_batch(
        self: nn.Module,
        inputs: list[list[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        if len(inputs) == 0:
            return {}
        if _spread(self):
            options = (record_timestamps, progress_bar, persistent_manager, warmup)
            return original(self, inputs, generation_config, continuous_batching_config, *options, **kwargs)
        max_new_tokens = kwargs.pop("max_new_tokens", None)
        if kwargs:
            generation_config = copy.deepcopy(
                self.generation_config if generation_config is None else generation_config
            )
            unknown = generation_config.update(**kwargs)
            if unknown:
                raise ValueError(f"{', '.join(sorted(unknown))}: not known to generate_batch or a generation config")
        context = self.continuous_batching_context_manager(
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            persistent_manager=persistent_manager,
            warmup=warmup,
        )
        with context as manager:
            names = manager.add_requests(inputs, max_new_tokens, record_timestamps=record_timestamps)
            return _collect(manager, names, progress_bar)

    return generate_batch


def _collect(manager: Any, names: list[str], progress_bar: bool) -> dict[str, GenerationOutput]:
    """Results of all rows, in the order of the prompts, and of `generate` within one.

    Raises:
        Exception: what ended the manager's loop.
    """
    from tqdm.auto import tqdm

    found: dict[str, GenerationOutput] = {}
    for name in tqdm(names, disable=not progress_bar, unit="request"):
        for row in (*(f"{name}__child#{i}" for i in range(manager.num_return_sequences - 1)), name):
            result = manager.get_result(row)
            if result is None:
                raise manager.background_thread_status.fatal_error or RuntimeError(f"request {row} has no result")
            found[row] = result
    failed = [row for row, result in found.items() if result.error is not None]
    fatal = manager.background_thread_status.fatal_error
    if fatal is not None:
        raise fatal
    if failed:
        logger.error("requests %s failed: %s", failed, found[failed[0]].error)
    return found


# By the name of what they stand for; each makes a function of the original and of `enable`'s settings.
WRAPPERS: dict[str, Callable[[Original, dict[str, Any]], Original]] = {
    "init_continuous_batching": _init,
    "destroy_cached_continuous_batching_manager": _destroy,
    "continuous_batching_context_manager": _context,
    "generate_batch": _batch,
}
