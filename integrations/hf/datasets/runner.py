"""A stream of rows through an engine: a window of them in flight, filled up at every step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.recipe import Ingest, Prepared, Recipe
from hf_paged.outputs import RequestOutput

CHUNK, FIRST_CHUNK = 256, 64  # the first is small: the engine waits for it


class Runner:
    """Answers numbered rows with an engine that nobody else steps meanwhile.

    Rows are rendered, tokenised and ordered a chunk at a time in a thread beside the engine; while one chunk runs the
    next is made ready, and a chunk's first rows join the batch of the last one's: the engine never runs dry. What is
    held is three chunks, whatever the dataset's size.

    Args:
        engine: with a tokenizer.
        recipe: see `Recipe`.
        window: rows that are queued in the engine at once. Default: twice the rows that it runs at once.

    Attributes:
        in_flight: rows queued now.
        engine_seconds: time in `engine.step`.

    Raises:
        BadInput: no prompt could fit, or the tokenizer cannot do what the recipe asks for.
    """

    def __init__(self, engine: Any, recipe: Recipe, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise BadInput(f"window={window}: must be at least 1")
        limit, which = engine.core.capacity.limit
        room = limit - recipe.sampling.max_tokens
        if room < 1:
            raise BadInput(f"max_tokens={recipe.sampling.max_tokens}: {which} allows {limit} tokens, prompt included")
        self.engine, self.recipe = engine, recipe
        self.window = window or 2 * engine.config.max_sequences
        self.ingest = Ingest(recipe, engine.tokenizer, room, engine.config.page_size)
        self.engine_seconds = 0.0
        self._flying: dict[str, Prepared] = {}

    @property
    def in_flight(self) -> int:
        """Rows queued in the engine."""
        return len(self._flying)

    def results(self, rows: Iterable[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the output row of every `(number, row)`, in the order in which they end."""
        for batch in self.batches(rows):
            yield from batch

    def batches(self, rows: Iterable[tuple[int, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The same, as one list after each step; it may be empty. Closing the iterator cancels what is in flight."""
        chunks = _Chunks(rows, self.ingest, max(self.window, CHUNK))
        try:
            while True:
                ended = self._fill(chunks)
                if not self._flying and not ended:
                    return
                begun = time.perf_counter()
                outputs = self.engine.step()
                self.engine_seconds += time.perf_counter() - begun
                yield ended + [self._ended(output) for output in outputs]
        finally:
            chunks.close()
            for name in list(self._flying):
                self.engine.cancel(name)
            self._flying.clear()

    def _fill(self, chunks: _Chunks) -> list[dict[str, Any]]:
        """Queue rows up to the window; those that cannot be queued come back as they end."""
        failed = []
        while len(self._flying) < self.window and len(failed) < self.window:
            ready = chunks.take(wait=not self._flying)
            if ready is None:
                break
            if ready.error is None:
                try:
                    name = f"{id(self):x}-{ready.row}"
                    self.engine.submit(ready.ids, self.recipe.params(ready.row), request_id=name)
                    self._flying[name] = ready
                    continue
                except ValueError as error:
                    ready.error = str(error)
            failed.append(output_row(ready))
        return failed

    def _ended(self, output: RequestOutput) -> dict[str, Any]:
        return output_row(self._flying.pop(output.request_id), output)


class _Chunks:
    """Prepared rows, one by one; the next chunk is made while this one is taken."""

    def __init__(self, rows: Iterable[tuple[int, Any]], ingest: Ingest, size: int) -> None:
        self.rows, self.ingest, self.size, self.next_size = iter(rows), ingest, size, FIRST_CHUNK
        self.ready: deque[Prepared] = deque()
        self.maker = ThreadPoolExecutor(1, thread_name_prefix="hf_paged-ingest")
        self.coming: Future | None = self.maker.submit(self._make)

    def take(self, wait: bool) -> Prepared | None:
        """The next row; None at the end, or where it is not ready and `wait` is false."""
        while not self.ready:
            if self.coming is None or not (wait or self.coming.done()):
                return None
            chunk = self.coming.result()
            self.coming = self.maker.submit(self._make) if chunk is not None else None
            self.ready.extend(chunk or ())
        return self.ready.popleft()

    def _make(self) -> list[Prepared] | None:
        rows = list(islice(self.rows, self.next_size))
        self.next_size = self.size
        return self.ingest(rows) if rows else None

    def close(self) -> None:
        self.maker.shutdown(wait=True, cancel_futures=True)


def output_row(ready: Prepared, output: RequestOutput | None = None) -> dict[str, Any]:
    """A row as it is written; without an output, that of a row which was not queued. `error` stands last."""
    done = output.outputs[0] if output is not None and output.outputs else None
    error = ready.error
    if output is not None and output.error is not None:
        error = f"{type(output.error).__name__}: {output.error}"
    return {
        "row": ready.row,
        "prompt": ready.prompt,
        "text": done.text if done is not None else "",
        "token_ids": list(done.token_ids) if done is not None else [],
        "finish_reason": done.finish_reason if done is not None else "error",
        "prompt_tokens": len(ready.ids),
        "truncated": ready.truncated,
        "error": error,
    }
