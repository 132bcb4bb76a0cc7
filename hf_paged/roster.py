"""Which rows wait, which run, and which requests have ended."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from hf_paged.memory import Memory
from hf_paged.ordering import depth_first
from hf_paged.prefix_cache import Found
from hf_paged.request import Request, Row
from hf_paged.store import KVStore


class Roster:
    """Rows and requests of one engine. A row that runs has a sequence; one that waits has none.

    Of a request with several rows the first computes the prompt; the others begin when it has its first token.

    Attributes:
        requests: those that have not ended, by id.
        running: rows that hold a sequence, in no order.
        ended: requests that have ended and were not collected yet.
    """

    def __init__(self, memory: Memory, store: KVStore) -> None:
        self.memory, self.store = memory, store
        self.requests: dict[str, Request] = {}
        self.running: dict[Row, None] = {}
        self.ended: list[Request] = []
        self._waiting: list[Row] = []  # the next to be admitted stands last

    @property
    def busy(self) -> bool:
        """Whether any row runs or waits."""
        return bool(self.running or self._waiting)

    @property
    def waits(self) -> bool:
        """Whether any row waits."""
        return bool(self._waiting)

    def soon(self, most: int) -> int:
        """Rows that decode side by side once prompts have been read, of which there is place for `most`."""
        return min(len(self.running) + len(self._waiting), most)

    def waiting(self) -> Iterator[Row]:
        """Rows that wait, in the order in which they should be admitted."""
        return reversed(self._waiting)

    def collect(self) -> list[Request]:
        """Requests that have ended since the last call."""
        ended, self.ended = self.ended, []
        return ended

    # -- requests

    def add(self, request: Request) -> None:
        """Queue a new request. It is known last: what is known is put back in its place after an interrupt."""
        self._wait(request.rows[0])
        self.requests[request.request_id] = request

    def end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """End all rows of a request that are not finished. One that has ended stays as it is."""
        if request.ended:
            return
        request.error, request.ending = error, reason
        for row in request.rows:
            self._release(row)
            self._unwait(row)
            row.finish_reason = row.finish_reason or reason
        self._report(request)

    def _report(self, request: Request) -> None:
        request.metrics.finished_time = time.perf_counter()
        request.ended = True
        if request.on_end is not None:
            request.on_end(request)
        self.requests.pop(request.request_id, None)
        self.ended.append(request)

    # -- rows

    def arrange(self, requests: Sequence[Request]) -> None:
        """Let `requests`, all of which must still wait, go in the order that suits a list (see `depth_first`)."""
        numbers = sorted(request.number for request in requests)
        lengths = [request.max_tokens for request in requests]
        if any(request.rows[0].reuses for request in requests):
            prompts = [request.prompt_ids for request in requests]
            found = [self.memory.find(ids, r.rows[0].salt) for ids, r in zip(prompts, requests, strict=True)]
            order = depth_first(prompts, lengths, [f.length for f in found], self.memory.page_size)
        else:
            order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        for number, at in zip(numbers, order, strict=True):
            requests[at].number = number
        self._waiting.sort(key=_last_first)

    def admit(self, row: Row, found: Found | None, now: float) -> None:
        """A waiting row gets a sequence, which begins with what is `found`."""
        self._unwait(row)
        row.sequence = self.memory.open(row.tokens, row.shared, row.salt, found)
        self.running[row] = None
        if row.request.metrics.first_scheduled_time is None:
            row.request.metrics.first_scheduled_time = now

    def branch(self, row: Row) -> None:
        """Begin a further row of a request: it shares the pages of the prompt, which the first has just computed."""
        row.sequence = self.memory.fork(row.request.rows[0].sequence, row.tokens)
        self.running[row] = None

    def preempt(self, row: Row, good: bool = True) -> None:
        """A running row gives up its pages and waits; it will compute its tokens' KV again.

        Args:
            good: whether its KV may be kept for others.
        """
        self._release(row, good)
        self._wait(row)

    def shed(self, most: int) -> None:
        """Let the rows beyond the first `most` wait."""
        if len(self.running) > most:
            for row in sorted(self.running, key=lambda row: row.order)[most:]:
                self.preempt(row)

    def finish(self, row: Row) -> None:
        """Release a row that has a finish reason, and report its request if it was the last."""
        self._release(row)
        request = row.request
        if request.finished and not request.ended and all(other.sequence is None for other in request.rows):
            self._report(request)

    def _release(self, row: Row, good: bool = True) -> None:
        """Take a row's pages, of which the prefix cache keeps what is good.

        Zeros go where numbers may not be finite. Those of a row that is `proven` are.
        """
        self.running.pop(row, None)
        sequence, row.sequence = row.sequence, None
        if sequence is not None:
            good = good and row.request.error is None
            if good and not row.proven:
                good = self.store.finite(sequence.pages)
            freed = self.memory.close(sequence, keep=good)
            if not good or row.finish_reason is None:
                self.store.scrub(freed)

    def forget(self) -> None:
        """Empty the prefix cache; rows that run compute all their KV again."""
        for row in self.running:
            row.sequence.shared, row.sequence.found = False, 0
        self.memory.forget()
        for row in list(self.running):
            self.preempt(row)

    def _wait(self, row: Row) -> None:
        insort(self._waiting, row, key=_last_first)

    def _unwait(self, row: Row) -> None:
        at = bisect_left(self._waiting, _last_first(row), key=_last_first)
        if at < len(self._waiting) and self._waiting[at] is row:
            del self._waiting[at]

    # -- laws

    def recover(self, most: int) -> None:
        """After an exception at an unknown place: page counts agree with tables, and at most `most` rows run.

        An interrupt may fall between any two lines, so who waits and who runs is found anew from the requests.
        """
        doubt = False
        for request in list(self.requests.values()):
            if request.error is not None or request.ending is not None:  # its end was interrupted
                doubt |= request.error is not None
                for row in request.rows:
                    row.finish_reason = row.finish_reason or request.ending or "error"
            if request.finished:
                self._report(request)
        rows = [row for request in self.requests.values() for row in request.rows]
        active = [row for row in rows if _begun(row) and not row.finish_reason]
        # What a row has stored since its last logits is not known to be good, and its release may have been broken off.
        doubt |= not all(self.store.finite(sequence.pages) for sequence in self.memory.sequences)
        self.running = {row: None for row in active if row in self.running and row.sequence is not None}
        self._waiting = sorted((row for row in active if row not in self.running), key=_last_first)
        for row in rows:
            if row not in self.running:
                row.sequence = None
        self.memory.repair({row.sequence for row in self.running}, doubt)
        for row in self.running:
            # The last page may be a copy that was not carried out, and pages behind it may hold anything by now.
            known = min(row.sequence.computed, len(row.tokens) - 1)
            self.memory.rollback(row.sequence, known - known % self.memory.page_size)
        self.shed(most)
        self.store.scrub(self.memory.pool.freed())

    def check(self) -> None:
        """Verify the laws of memory, and that every row is where it should be.

        Raises:
            AssertionError: one does not hold.
        """
        self.memory.check()
        if {row.sequence for row in self.running} != self.memory.sequences:
            raise AssertionError(f"{len(self.running)} rows run, {len(self.memory.sequences)} sequences are open")
        known = [row for request in self.requests.values() for row in request.rows]
        active = {row for row in known if _begun(row) and not row.finish_reason}
        if active != {*self.running, *self._waiting} or len(active) != len(self.running) + len(self._waiting):
            raise AssertionError(f"{len(active)} rows are active: {len(self.running)} run, {len(self._waiting)} wait")
        if any(row.sequence is not None for row in self._waiting):
            raise AssertionError("a waiting row holds a sequence")
        if self._waiting != sorted(self._waiting, key=_last_first):
            raise AssertionError("waiting rows are out of order")


def _begun(row: Row) -> bool:
    """Whether a row computes for itself: the first of a request does, the others once that one has a token."""
    return row.index == 0 or bool(row.request.rows[0].output_ids)


def _last_first(row: Row) -> tuple[float, ...]:
    """Sorts waiting rows so that the next one stands at the end, where taking it is cheap."""
    return tuple(-part for part in row.order)
