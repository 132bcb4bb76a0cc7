"""The loop: decide, reserve, plan, forward, sample, commit. Knows neither transformers nor a tokenizer."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hf_paged.admission import Capacity, checked_length, checked_prompt
from hf_paged.finish import check_finished
from hf_paged.memory import Memory, OutOfPages
from hf_paged.outputs import RequestMetrics
from hf_paged.params import SamplingParams
from hf_paged.plan import PlanRow, StepPlan, build_plan
from hf_paged.request import Request, Row, RowHooks
from hf_paged.sampling import SampleResult, SamplingRow, prompt_logprobs, sample
from hf_paged.scheduler import Decision, Limits, decide
from hf_paged.seeds import mix_seed
from hf_paged.stats import EngineStats, Recorder
from hf_paged.store import KVStore
from hf_paged.text import Decode

Forward = Callable[[StepPlan], torch.Tensor]


@dataclass(frozen=True)
class CoreSettings:
    """What `EngineCore` needs to know, all decided: limits, ids that end a row, the vocabulary."""

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    check: bool = False


@dataclass(eq=False)
class StepResult:
    """What a step gave: tokens in the order of rows, and the requests that ended."""

    tokens: list[tuple[Row, int]] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)


class EngineCore:
    """Continuous batching over one model.

    Args:
        forward: plan → float logits `[len(plan.logits_at), vocab]`; stores KV of all tokens of the plan.
        store: the model's KV.
        settings: see `CoreSettings`.
        decode: token ids → text, for stop strings; None: they are refused.
        encode: text → token ids, for bad words; None: they are refused.
        device: where plans go.
    """

    def __init__(
        self,
        forward: Forward,
        store: KVStore,
        settings: CoreSettings,
        *,
        decode: Decode | None = None,
        encode: Callable[[str], list[int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.forward, self.store, self.settings = forward, store, settings
        self.decode, self.encode, self.device = decode, encode, device
        self.memory = Memory(store.num_pages, store.page_size)
        self.capacity = Capacity(settings.max_model_len, store.num_pages, store.page_size, settings.vocab_size)
        self.recorder = Recorder(store.bytes_per_page, store.page_size)
        self._requests: dict[str, Request] = {}
        self._waiting: list[Row] = []  # the next to be admitted stands last
        self._running: dict[Row, None] = {}
        self._ended: list[Request] = []
        self._submitted = 0

    @property
    def has_work(self) -> bool:
        """Whether another step has something to do or to report."""
        return bool(self.busy or self._ended)

    @property
    def busy(self) -> bool:
        """Whether any row runs or waits."""
        return bool(self._running or self._waiting)

    @property
    def requests(self) -> list[Request]:
        """Requests that have not ended."""
        return list(self._requests.values())

    @property
    def submitted(self) -> int:
        """Requests queued so far."""
        return self._submitted

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        prompt: str | None = None,
        request_id: str | None = None,
        hooks: Sequence[RowHooks] | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            prompt_ids: at least one token id.
            seed: keys the noise of its rows; row `i` of several uses `mix_seed(seed, i)`.
            hooks: one for each of its `params.num_samples` rows.

        Raises:
            ValueError: the prompt or a parameter cannot be served; the message names it and says what is allowed.
        """
        name = request_id if request_id is not None else f"request-{self._submitted}"
        if name in self._requests:
            raise ValueError(f"request_id={name!r} is taken by a request that has not ended")
        for argument, needed in (("stop", self.decode), ("bad_words", self.encode)):
            if getattr(params, argument) and needed is None:
                raise ValueError(f"{argument}={getattr(params, argument)!r} needs a tokenizer: give the engine one")
        ids = checked_prompt(prompt_ids, self.capacity)
        max_tokens = checked_length(len(ids), params, self.capacity)
        metrics = RequestMetrics(time.perf_counter())
        request = Request(name, self._submitted, prompt, ids, params, max_tokens, metrics)
        for index in range(params.num_samples):
            row_hooks = hooks[index] if hooks else RowHooks()
            sampling = self._sampling_row(request, mix_seed(seed, index) if index else seed, row_hooks)
            request.rows.append(Row(request, index, list(ids), sampling, row_hooks))
        self._submitted += 1
        self._requests[name] = request
        self._wait(request.rows[0])
        return request

    def _sampling_row(self, request: Request, seed: int, hooks: RowHooks) -> SamplingRow:
        params = request.params
        return SamplingRow(
            params=params,
            seed=seed,
            position=len(request.prompt_ids),
            prompt_ids=request.prompt_ids,
            output_ids=[],
            pipeline=hooks.pipeline,
            eos_ids=() if params.ignore_eos else self.settings.eos_ids,
            bad_word_ids=tuple(tuple(self.encode(word)) for word in params.bad_words),
            keep_logits=hooks.keep_logits,
            keep_scores=hooks.keep_scores,
        )

    def cancel(self, request_id: str) -> bool:
        """End a request now; its pages are free when this returns. False: no such request is under way."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, "cancelled")
        return True

    def step(self) -> StepResult:
        """Compute one batch.

        After an exception (from the model, or an interrupt) every request is where it was before the step: it may be
        tried again or cancelled.
        """
        begun = time.perf_counter()
        result = StepResult()
        try:
            decision = self._decide()
            self._apply(decision)
            work = self._reserve(decision)
            if work:
                logits = self._forward(work)
                self._conclude(work, logits, result)
        except BaseException:
            self._recover()
            raise
        result.finished, self._ended = self._ended, []
        self.recorder.step_seconds += time.perf_counter() - begun
        if self.settings.check:
            self.memory.check()
        return result

    def stats(self) -> EngineStats:
        """Counters since the start or the last `recorder.reset()`."""
        return self.recorder.stats(self.memory.pool.free, self.memory.pool.num_pages)

    def check(self) -> None:
        """Verify the laws of memory, and that every sequence belongs to a running row."""
        self.memory.check()
        sequences = {row.sequence for row in self._running}
        if sequences != self.memory.sequences:
            raise AssertionError(f"{len(sequences)} rows run, {len(self.memory.sequences)} sequences are open")

    # -- parts of a step

    def _decide(self) -> Decision:
        settings, memory = self.settings, self.memory
        limits = Limits(settings.max_batch_tokens, settings.max_sequences, memory.pool.free, memory.page_size)
        return decide(self._running, reversed(self._waiting), limits, lambda row, n: memory.needed(row.sequence, n))

    def _apply(self, decision: Decision) -> None:
        for row in decision.preempted:
            self._release(row)
            row.request.metrics.preemptions += 1
            self._wait(row)
        now = time.perf_counter()
        for row in decision.admitted:
            self._waiting.pop()
            row.sequence = self.memory.open(row.tokens)
            self._running[row] = None
            if row.request.metrics.first_scheduled_time is None:
                row.request.metrics.first_scheduled_time = now
        self.recorder.add(preemptions=len(decision.preempted))

    def _reserve(self, decision: Decision) -> list[PlanRow]:
        """Pages for the work. Forks share pages, so `decide` had estimates: a row that gets none sits this step out."""
        copies, rows = [], []
        for work in decision.work:
            row, count = work.row, work.count
            try:
                copies += self.memory.reserve(row.sequence, count)
            except OutOfPages:
                continue
            prompt = row.request.params.prompt_logprobs is not None and row.index == 0 and not row.output_ids
            logits = count if prompt else int(count == row.sequence.pending)
            rows.append(PlanRow(row, row.sequence, count, logits))
        self.store.copy(copies)
        return rows

    def _forward(self, work: list[PlanRow]) -> torch.Tensor:
        plan = build_plan(work, self.memory.page_size, self.device)
        begun = time.perf_counter()
        logits = self.forward(plan)
        self.recorder.forward_seconds += time.perf_counter() - begun
        return logits

    def _conclude(self, work: list[PlanRow], logits: torch.Tensor, result: StepResult) -> None:
        """Sample what is complete, then commit, fork, append and finish row by row."""
        drawing: list[Row] = []
        index: list[int] = []
        end = prompt_tokens = 0
        for planned in work:
            row, begin, end = planned.row, end, end + planned.logits
            if planned.logits and not row.output_ids and row.request.params.prompt_logprobs is not None:
                self._note_prompt(row, planned, logits[begin:end])
            if planned.count == planned.sequence.pending:
                rows = row.request.rows if row.index == 0 and not row.output_ids else [row]
                drawing += rows
                index += [end - 1] * len(rows)
            prompt_tokens += planned.count if planned.count > 1 or not row.output_ids else 0
        if len(index) != len(logits) or len(drawing) > len(work):
            logits = logits[torch.tensor(index, dtype=torch.long, device=logits.device)]
        sampled = sample(logits, [row.sampling for row in drawing]) if drawing else None
        for planned in work:
            self.memory.commit(planned.sequence, planned.count)
        for i, row in enumerate(drawing):  # all rows of a request share its prompt before any of them can end
            if row.sequence is None and sampled.errors[i] is None:
                self._branch(row)
        for i, row in enumerate(drawing):
            self._take(row, sampled, i, result)
        memory = self.memory
        self.recorder.add(steps=1, rows=len(work), prompt_tokens=prompt_tokens, generated_tokens=len(drawing))
        self.recorder.memory(len(self._running), memory.pool.used, memory.live_tokens)

    def _note_prompt(self, row: Row, planned: PlanRow, logits: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens, from the logits behind the tokens before them."""
        request, first = row.request, planned.sequence.computed
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        ids = request.prompt_ids[first + 1 : first + planned.count + 1]
        done = len(request.prompt_logprobs) - 1 - first  # a preempted prompt is computed again: some are known
        if done < len(ids):
            next_ids = torch.tensor(ids[done:], device=logits.device)
            request.prompt_logprobs += prompt_logprobs(
                logits[done : len(ids)], next_ids, request.params.prompt_logprobs
            )

    def _take(self, row: Row, sampled: SampleResult, i: int, result: StepResult) -> None:
        """Append the token that was drawn for `row`; an error ends the request alone."""
        request = row.request
        if row.finish_reason:
            return
        if sampled.errors[i] is not None:
            self._end(request, "error", sampled.errors[i])
            return
        token = sampled.tokens[i]
        row.append(token if row.hooks.replace is None else row.hooks.replace(row, token))
        if sampled.logprobs is not None and sampled.logprobs[i] is not None:
            row.logprobs.append(sampled.logprobs[i])
        if row.hooks.keep_logits:
            row.logits.append(sampled.logits[i])
        if row.hooks.keep_scores:
            row.scores.append(sampled.scores[i])
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.perf_counter()
        result.tokens.append((row, row.tokens[-1]))
        try:
            finished = check_finished(row, self.decode)
            if finished and row.hooks.closing is not None:
                row.hooks.closing(row)
        except Exception as error:
            self._end(request, "error", error)
            return
        if finished:
            self._release(row)
            if request.finished:
                self._report(request)

    def _branch(self, row: Row) -> None:
        """Begin a further row of a request: it shares the pages of the prompt, which row 0 has just computed."""
        if len(self._running) < self.settings.max_sequences:
            row.sequence = self.memory.fork(row.request.rows[0].sequence, row.tokens)
            self._running[row] = None
        else:
            self._wait(row)

    # -- rows that come and go

    def _wait(self, row: Row) -> None:
        insort(self._waiting, row, key=_last_first)

    def _unwait(self, row: Row) -> None:
        at = bisect_left(self._waiting, _last_first(row), key=_last_first)
        if at < len(self._waiting) and self._waiting[at] is row:
            del self._waiting[at]

    def _release(self, row: Row) -> None:
        """Take a row's pages. Zeros go where numbers may not be finite: pages of a row that never gave a good token."""
        self._running.pop(row, None)
        if row.sequence is not None:
            freed = self.memory.close(row.sequence)
            row.sequence = None
            if not row.output_ids or row.request.error is not None:
                self.store.scrub(freed)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """End all rows of a request that are not finished."""
        request.error = error
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
        del self._requests[request.request_id]
        self._ended.append(request)

    def _recover(self) -> None:
        """After an exception anywhere in a step: page counts agree with page tables, every row can be computed on."""
        self.memory.repair({row.sequence for row in self._running})
        for row in self._running:
            if row.sequence is not None and not row.sequence.pending:
                self.memory.rollback(row.sequence, row.sequence.computed - 1)


def _last_first(row: Row) -> tuple[float, ...]:
    """Sorts waiting rows so that the next one stands at the end, where taking it is cheap."""
    return tuple(-part for part in row.order)
