"""Results of a manager's requests, from its thread to whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import GenerationOutput

logger = logging.getLogger("hf_paged")


class Results:
    """Outputs in the order in which they came, or straight to the handler that is registered for their request."""

    def __init__(self) -> None:
        self._new, self._open = threading.Condition(threading.RLock()), False
        self._outputs: list[GenerationOutput] = []
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], Any], asyncio.AbstractEventLoop]] = {}

    def put(self, outputs: list[GenerationOutput]) -> None:
        """Hand outputs over. A handler whose event loop is closed gets no more."""
        with self._new:
            for output in outputs:
                handler, loop = self._handlers.get(output.request_id, (None, None))
                if output.is_finished():
                    self._handlers.pop(output.request_id, None)
                if handler is None:
                    self._outputs.append(output)
                    continue
                try:
                    loop.call_soon_threadsafe(handler, output)
                except RuntimeError as error:
                    self._handlers.pop(output.request_id, None)
                    logger.warning("a result of request %s is lost: %s", output.request_id, error)
            self._new.notify_all()

    def handle(self, request_id: str, handler: Callable[[GenerationOutput], Any]) -> None:
        """Let `handler` have the outputs of a request, on the event loop that runs now; also those that are here."""
        with self._new:
            self._handlers[request_id] = handler, asyncio.get_running_loop()
            early = [output for output in self._outputs if output.request_id == request_id]
            self._outputs = [output for output in self._outputs if output.request_id != request_id]
            self.put(early)  # before any that come now

    def open(self) -> None:
        """More may come."""
        self._open = True

    def close(self) -> None:
        """No more will come: nobody waits any longer."""
        with self._new:
            self._open = False
            self._new.notify_all()

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        """The next output, of one request or of any. None: none came in `timeout` seconds, or no more will."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._new:
            while True:
                for at, output in enumerate(self._outputs):
                    if request_id is None or output.request_id == request_id:
                        return self._outputs.pop(at)
                left = None if until is None else until - time.monotonic()
                if not self._open or (left is not None and left <= 0):
                    return None
                self._new.wait(left)
