"""The thread of a manager: takes requests in, steps the engine, tells what came of it."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from hf_paged.integrations.batching.recipes import Recipes
from hf_paged.integrations.batching.requests import Job
from hf_paged.integrations.batching.results import Results
from hf_paged.integrations.batching.settings import BatchSettings
from hf_paged.integrations.call import Call
from hf_paged.integrations.registry import REGISTRY
from hf_paged.seeds import draw_seed

logger = logging.getLogger("hf_paged")
GO_ON, FLUSH, HALT = range(3)


class Loop:
    """Requests of one manager, and the thread that answers them.

    It knows no manager: one that nobody holds any more is collected while its thread lives.

    Attributes:
        recipes: what makes calls of requests.
        waiting: requests that were not taken in yet; `jobs`: those under way.
        error: what ended the thread, if anything did.
        kept: whether the engine is to outlive the thread where the thread has made it.
    """

    def __init__(self, recipes: Recipes, results: Results, settings: BatchSettings) -> None:
        self.recipes, self.results, self.settings = recipes, results, settings
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.kept = self._made_engine = self._resting = False
        self._names: set[str] = set()  # of requests that have not ended
        self._cancelled: set[str] = set()
        self._stopping, self._seed = GO_ON, settings.seed
        self._pausing: list[int] = []

    # -- from other threads

    def start(self) -> None:
        """Start the thread."""
        self._stopping, self.error = GO_ON, None
        self.results.open()
        self.thread = threading.Thread(target=self._run, name="hf_paged batching", daemon=True)
        self.thread.start()

    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def stop(self, how: int = FLUSH) -> None:
        """Take no more requests; answer those that there are (`FLUSH`), or end them now (`HALT`)."""
        with self.changed:
            self._stopping = max(self._stopping, how)
            self.changed.notify_all()

    def add(self, job: Job, timeout: float) -> None:
        """Queue a request.

        Raises:
            ValueError: its id is taken.
            RuntimeError: no more are taken.
            queue.Full: the queue had no room for `timeout` seconds.
        """
        most = self.settings.max_queue_size
        with self.changed:
            if job.request_id in self._names:
                raise ValueError(f"request_id={job.request_id!r} is taken by a request that has not ended")
            room = self.changed.wait_for(lambda: not most or len(self.waiting) < most or self._closed, timeout)
            if self._closed:
                raise RuntimeError(f"no request is taken: {self._why_closed()}") from self.error
            if not room:
                raise queue.Full
            self.waiting.append(job)
            self._names.add(job.request_id)
            self.changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request; one that there is not is left alone."""
        with self.changed:
            self._cancelled.add(request_id)
            self.changed.notify_all()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No step is made inside."""
        with self.changed:
            self._pausing.append(threading.get_ident())
            self.changed.notify_all()
        try:
            with self.changed:
                self.changed.wait_for(lambda: self._resting or not self.is_alive())
                if not self._resting:
                    raise RuntimeError("the loop ended before it could pause") from self.error
            yield
        finally:
            with self.changed:
                self._pausing.remove(threading.get_ident())
                self.changed.notify_all()

    @property
    def paused_here(self) -> bool:
        """Whether this very thread is inside `pause`."""
        return threading.get_ident() in self._pausing

    @property
    def _closed(self) -> bool:
        return self._stopping != GO_ON or self.error is not None

    def _why_closed(self) -> str:
        return "the manager is stopped" if self.error is None else f"the loop has failed ({self.error})"

    # -- in the thread

    def _run(self) -> None:
        try:
            while self._next():
                self._turn()
        except BaseException as error:
            logger.error("the loop has failed: %s", error, exc_info=True)
            self.error = error
        finally:
            self._end()

    def _next(self) -> bool:
        """Wait until there is something to do; False: nothing will be."""
        with self.changed:
            while True:
                if self._stopping == HALT:
                    return False
                if self._pausing:
                    self._resting = True
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: not self._pausing)
                    self._resting = False
                    continue
                if self.jobs or self.waiting or self._cancelled:
                    return True
                if self._stopping == FLUSH:
                    return False
                self.changed.wait()

    def _turn(self) -> None:
        """Take requests in, make one step, tell what is new."""
        self._cancel()
        for job in self._taken():
            self._begin(job)
        calls = [job.call for job in self.jobs if job.call is not None]
        for engine in {call.engine for call in calls}:
            engine.advance([request for call in calls if call.engine is engine for request in call.requests])
        for job in self.jobs:
            self._tell(job)
        with self.changed:
            self._names -= {job.request_id for job in self.jobs if job.over}
            self.jobs = [job for job in self.jobs if not job.over]

    def _taken(self) -> list[Job]:
        """Waiting requests, as many as can run beside those under way."""
        room = self.recipes.max_sequences - len(self.jobs)
        with self.changed:
            taken = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
            self.jobs += taken
            self.changed.notify_all()
        return taken

    def _begin(self, job: Job) -> None:
        """Queue a request on the engine; one that cannot be served fails alone."""
        self._made_engine |= REGISTRY.find(self.recipes.model) is None
        try:
            made = self.recipes.make(job)
            if not isinstance(made, Call):
                self.results.put(job.answered(made, self.recipes.eos_ids(job)))
                return
            job.call = made
            if made.config.do_sample:
                self._seed = draw_seed() if self._seed is None else self._seed
                made.base, made.first = self._seed, job.index
            if self.settings.return_logprobs:
                made.extra = {"logprobs": 0}
            made.queue()
        except Exception as error:
            self.results.put(job.fail(error))
            if job.call is not None:
                job.call.end()

    def _tell(self, job: Job) -> None:
        if job.over:
            return
        self.results.put(job.news())
        if job.over:
            job.call.end()

    def _cancel(self) -> None:
        with self.changed:
            names, self._cancelled = self._cancelled, set()
            gone = [job for job in self.waiting if job.request_id in names]
            for job in gone:
                self.waiting.remove(job)
                self._names.discard(job.request_id)
        for job in gone:
            self.results.put(job.fail("the request was cancelled"))
        for job in self.jobs:
            if job.request_id in names and job.call is not None:
                for name in job.call.names:
                    job.call.engine.cancel(name)

    def _end(self) -> None:
        """Tell all that are left that they end, and leave nothing on the engine."""
        with self.changed:
            left = [*self.jobs, *self.waiting]
            self.jobs, self.waiting, self._names = [], deque(), set()
            self._stopping = HALT
        error = self.error or "the manager was stopped before the request ended"
        for job in left:
            self.results.put(job.fail(error))
            if job.call is not None:
                job.call.end()
        if self._made_engine and not self.kept:
            REGISTRY.forget(self.recipes.model)
            self._made_engine = False
        with self.changed:
            self.changed.notify_all()
        self.results.close()
