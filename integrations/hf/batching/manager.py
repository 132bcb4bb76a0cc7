"""`BatchingManager`: what `init_continuous_batching` returns while hf_paged is enabled."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.generation.continuous_batching.requests import GenerationOutput

from hf_paged.integrations.batching.loop import FLUSH, HALT, Loop
from hf_paged.integrations.batching.recipes import Recipes
from hf_paged.integrations.batching.requests import Job, checked_ids, checked_sampling
from hf_paged.integrations.batching.results import Results
from hf_paged.integrations.batching.settings import read_settings

logger = logging.getLogger("hf_paged")
QUEUE_SECONDS = 10.0  # that `add_request` waits where the queue is full


class BatchingManager:
    """transformers' `ContinuousBatchingManager` over the model's engine: the same methods, the same results.

    A thread of its own steps the engine, which other calls share. Requests have the tokens that `generate` gives for
    their prompt alone. The manager keeps its model alive; its thread ends with `stop`, or once nobody holds the manager
    and all that was asked for is answered.

    Args:
        generation_config: for all requests.
        continuous_batching_config: a `ContinuousBatchingConfig`; see `read_settings`.
        original: transformers' `generate`.
        settings: of `enable`.

    Raises:
        ValueError: a setting that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        generation_config: Any,
        continuous_batching_config: Any,
        *,
        original: Callable[..., Any],
        settings: dict[str, Any],
    ) -> None:
        self.model, self.continuous_batching_config = model, continuous_batching_config
        self.warmed_up, self.batch_processor = False, None
        self._settings = read_settings(continuous_batching_config, settings.get("page_size", 16))
        self._recipes = (original, model, settings)
        self._results = Results()
        self._loop = Loop(self._recipes_for(generation_config), self._results, self._settings)
        self._lock, self._names, self._index = threading.Lock(), 0, 0
        weakref.finalize(self, _stop, weakref.ref(self._loop))

    def use(self, generation_config: Any) -> None:
        """Let requests that are taken in from now on have these settings."""
        self._loop.recipes = self._recipes_for(generation_config)

    def _recipes_for(self, generation_config: Any) -> Recipes:
        recipes = Recipes(*self._recipes, generation_config, self._settings.engine)
        self.generation_config, self.num_return_sequences = generation_config, recipes.sequences
        return recipes

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or what is stored of it, has no manager."""
        return type(None), ()

    # -- the thread

    @property
    def background_thread_status(self) -> SimpleNamespace:
        """Has `fatal_error`: what ended the thread, or None."""
        return SimpleNamespace(fatal_error=self._loop.error)

    def warmup(self) -> None:
        """Nothing needs to be captured here."""
        self.warmed_up = True

    def is_running(self) -> bool:
        """Whether the thread is started and lives."""
        return self._loop.is_alive()

    def start(self) -> None:
        """Start the thread; again after `stop`, or after an error."""
        if self.is_running():
            logger.warning("Manager thread is already running.")
        else:
            self._loop.start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Take no more requests, and end the thread once all there are have ended.

        Args:
            block: wait for the thread, at most `timeout` seconds.
            keep_for_next_session: keep the manager at the model, and what it made, for `init_continuous_batching`.
            hard_stop: end all requests now; they fail.

        Raises:
            RuntimeError: called inside `pause`, which would wait for itself.
        """
        if self._loop.thread is None:
            logger.warning("Manager not started.")
            return
        if self._loop.paused_here:
            raise RuntimeError("Cannot stop the manager from inside a pause: leave the `pause` context first.")
        begun, self._loop.kept = time.perf_counter(), keep_for_next_session
        self._loop.stop(HALT if hard_stop else FLUSH)
        if block:
            self.join(begun, timeout)
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait for the thread to end, at most `timeout` seconds."""
        thread = self._loop.thread
        if thread is None:
            return
        thread.join(timeout)
        if thread.is_alive():
            logger.warning("Generation thread did not exit after join timeout (%s).", timeout)
        else:
            logger.info("the loop stopped after %.2f s", time.perf_counter() - stop_trigger_time)
            self._loop.thread = None

    def destroy(self) -> None:
        """Stop the thread. May be called again."""
        if self.is_running():
            self.stop()

    def pause(self) -> AbstractContextManager[None]:
        """A context inside which no step is made: for a thread that uses the model, or changes it."""
        if not self.is_running():
            raise RuntimeError("Cannot pause generation while no generation loop is running.")
        return self._loop.pause()

    # -- requests

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str:
        """Queue a prompt; what cannot be served comes back as a failed result.

        Args:
            input_ids: token ids of the prompt.
            max_new_tokens, eos_token_id: instead of those of the generation config.
            streaming: give a result for each token, not at the end alone.
            record_timestamps: of each token, in seconds of `time.perf_counter()`.
            logit_processor_kwargs: temperature, top_k and top_p of its own, with `per_request_processors=True` in the
                manager's configuration.

        Returns:
            the request's id.

        Raises:
            ValueError: the prompt is no list of ids, the id is taken, or an argument is not allowed.
            RuntimeError: the manager is stopped, or its thread has failed.
            queue.Full: `max_queue_size` requests have waited for ten seconds.
        """
        checked_sampling(logit_processor_kwargs, self._settings.per_request_processors)
        ids = checked_ids(input_ids)
        ends = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        with self._lock:
            index, self._index = self._index, self._index + 1
            if request_id is None:
                request_id, self._names = f"req_{self._names}", self._names + 1
        job = Job(request_id, ids, index, self.num_return_sequences, max_new_tokens, streaming, record_timestamps)
        job.eos_token_id, job.sampling = None if ends is None else tuple(ends), logit_processor_kwargs
        self._loop.add(job, QUEUE_SECONDS)
        return job.request_id

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """`add_request` for each of several prompts; none is queued where one is no list of ids."""
        prompts = [checked_ids(input_ids) for input_ids in inputs]
        options = dict(max_new_tokens=max_new_tokens, streaming=streaming, record_timestamps=record_timestamps)
        return [self.add_request(prompt, **options, **logit_processor_kwargs) for prompt in prompts]

    def cancel_request(self, request_id: str) -> None:
        """End a request; its result says that it was cancelled."""
        self._loop.cancel(request_id)

    # -- results

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next result, of one request or of any. None: none came in `timeout` seconds, or the thread has ended."""
        return self._results.get(request_id, timeout)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until the thread has ended."""
        while (result := self.get_result()) is not None:
            yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Results of one request, until it ends."""
        while (result := self.get_result(request_id)) is not None:
            yield result
            if result.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Let `callback` have a request's results, on the event loop that runs now."""
        self._results.handle(request_id, callback)


def _stop(loop: weakref.ref[Loop]) -> None:
    """Nobody holds the manager of this loop any more: its thread, which holds the loop, ends when all is answered."""
    alive = loop()
    if alive is not None:
        alive.stop()
