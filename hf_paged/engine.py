"""The loop: decide, reserve, plan, forward, sample, commit. Knows neither transformers nor a tokenizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from hf_paged.admission import Capacity, bad_word_ids, checked_length, checked_prompt, checked_scoring
from hf_paged.burst import Stepper, run_burst, run_visit
from hf_paged.config import CoreSettings
from hf_paged.drafting import Drafting
from hf_paged.drawing import all_finite, note_prompts, rows_to_draw
from hf_paged.memory import Memory, OutOfPages
from hf_paged.outcomes import Outcomes, StepResult
from hf_paged.outputs import RequestMetrics
from hf_paged.params import SamplingParams
from hf_paged.plan import PlanRow, StepPlan, build_plan
from hf_paged.request import Request, Row, RowHooks
from hf_paged.roster import Roster
from hf_paged.scheduler import Decision, Limits, decide
from hf_paged.scoring import Scoring, note_scores
from hf_paged.second_tier import SecondTier
from hf_paged.speculation.proposal import Proposal
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.verify import draw
from hf_paged.stats import EngineStats, Optimum, Recorder
from hf_paged.store import KVStore
from hf_paged.supply import Supply
from hf_paged.text import Decode
from hf_paged.tiers import Tier

Forward = Callable[[StepPlan], torch.Tensor]


class EngineCore:
    """Continuous batching over one model.

    Args:
        forward: plan → float logits `[len(plan.logits_at), vocab]`; stores KV of all tokens of the plan.
        store: the model's KV.
        settings: see `CoreSettings`.
        decode: token ids → text, for stop strings; None: they are refused.
        encode: text → token ids, for bad words; None: they are refused.
        device: where plans go.
        tiers: where pages go that the prefix cache gives up, the fastest first.
        measured: seconds that were measured here → those that speculation goes by. Default: the same.
        stepper: decodes several steps at once on the device, where it can.
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
        tiers: Sequence[Tier] = (),
        measured: Callable[[float], float] | None = None,
        stepper: Stepper | None = None,
    ) -> None:
        self.stepper = stepper
        self.forward, self.store, self.settings = forward, store, settings
        self.encode, self.device = encode, device
        self.memory = Memory(store.num_pages, store.page_size, settings.prefix_caching)
        self.supply = Supply(self.memory)
        self.second = SecondTier(self.memory, store, tiers) if tiers else None
        self.capacity = Capacity(settings.max_model_len, store.num_pages, store.page_size, settings.vocab_size)
        self.recorder = Recorder(store.bytes_per_page, store.page_size)
        self.roster = Roster(self.memory, store)
        self.optimum = Optimum(store.page_size) if settings.track_optimum else None
        self.drafting = Drafting(self.memory, store, measured)
        self.outcomes = Outcomes(self.roster, self.drafting, decode, self.optimum)
        self._submitted = 0

    @property
    def has_work(self) -> bool:
        """Whether another step has something to do or to report."""
        return bool(self.busy or self.roster.ended)

    @property
    def busy(self) -> bool:
        """Whether any row runs or waits."""
        return self.roster.busy

    @property
    def requests(self) -> list[Request]:
        """Requests that have not ended."""
        return list(self.roster.requests.values())

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
        speculator: Speculator | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            prompt_ids: at least one token id.
            seed: keys the noise of its rows; row `i` of several uses `mix_seed(seed, i)`.
            hooks: one for each of its `params.num_samples` rows.
            speculator: drafts for it, made by `drafting.speculator`.

        Raises:
            ValueError: the prompt or a parameter cannot be served; the message names it and says what is allowed.
        """
        name = self._free_id() if request_id is None else request_id
        if name in self.roster.requests:
            raise ValueError(f"request_id={name!r} is taken by a request that has not ended")
        for argument, needed in (("stop", self.outcomes.decode), ("bad_words", self.encode)):
            if getattr(params, argument) and needed is None:
                raise ValueError(f"{argument}={getattr(params, argument)!r} needs a tokenizer: give the engine one")
        ids = checked_prompt(prompt_ids, self.capacity)
        max_tokens = checked_length(len(ids), params, self.capacity)
        metrics = RequestMetrics(time.perf_counter())
        request = Request(name, self._submitted, prompt, ids, params, max_tokens, metrics)
        words = bad_word_ids(params.bad_words, self.encode)
        shared = self.memory.prefixes is not None and params.prefix_caching is not False
        request.add_rows(seed, hooks, self.settings.eos_ids, words, shared)
        request.speculator = speculator
        self._add(request)
        return request

    def submit_scoring(self, token_ids: Sequence[int], scoring: Scoring, params: SamplingParams) -> Request:
        """Queue tokens to score, in a request that generates nothing.

        Args:
            token_ids: at least one token id.
            params: of which only `cache_salt`, `prefix_caching` and `priority` count.

        Raises:
            ValueError: they cannot be scored; the message says why.
        """
        ids = checked_scoring(token_ids, scoring, self.capacity)
        scoring.begin(len(ids))
        metrics = RequestMetrics(time.perf_counter())
        request = Request(self._free_id(), self._submitted, None, ids, params, 1, metrics, scoring=scoring)
        request.add_rows(0, None, (), (), self.memory.prefixes is not None and params.prefix_caching is not False)
        self._add(request)
        return request

    def _add(self, request: Request) -> None:
        self._submitted += 1  # first: no two have the same number
        with self._mending():
            self.roster.add(request)

    def arrange(self, requests: Sequence[Request]) -> None:
        """Let `requests`, all of which must still wait, go in the order that suits a list."""
        with self._mending():
            self.roster.arrange(requests)

    def _free_id(self) -> str:
        names = (f"request-{number}" for number in itertools.count(self._submitted))
        return next(name for name in names if name not in self.roster.requests)

    def cancel(self, request_id: str) -> bool:
        """End a request now; its pages are free when this returns. False: no such request is under way.

        After an interrupt in here it has ended, or goes on.
        """
        request = self.roster.requests.get(request_id)
        if request is None:
            return False
        with self._mending():
            self.roster.end(request, "cancelled")
            self.drafting.tidy()
        return True

    def fail(self, error: Exception) -> None:
        """End all requests: none of them can go on."""
        with self._mending():
            for request in self.requests:
                self.roster.end(request, "error", error)
            self.drafting.tidy()

    @contextmanager
    def _mending(self) -> Iterator[None]:
        """An exception at any place in here leaves all laws kept, and every request where it was or at its end."""
        try:
            yield
        except BaseException:
            self.roster.recover(self.settings.max_sequences)
            self.drafting.tidy()
            raise

    def step(self) -> StepResult:
        """Compute one batch.

        After an exception (from the model, or an interrupt) every request is where it was before the step: it may be
        tried again or cancelled.
        """
        begun = time.perf_counter()
        result = StepResult()
        with self._mending():
            decision = self._decide()
            self._apply(decision)
            work = self._reserve(decision)
            soon = self.roster.soon(self.settings.max_sequences)
            self.drafting.burst = self.stepper.most if self.stepper is not None else 0
            if not (self.stepper is not None and run_visit(self, work, soon, result)):
                work, drafts = self.drafting.propose(work, self.settings.max_batch_tokens, self.roster.waits, soon)
                if work and not (self.stepper is not None and not drafts and run_burst(self, work, result)):
                    logits = self._forward(work)
                    self._conclude(work, drafts, logits, result)
            # The second of two pages with the same tokens was given up, whatever it holds.
            self.store.scrub(self.memory.take_replaced())
        result.finished = self.roster.collect()
        seconds = time.perf_counter() - begun
        self.recorder.step_seconds += seconds
        self.drafting.stepped(seconds, len(result.ids))
        if self.settings.check:
            self.check()
        return result

    def stats(self) -> EngineStats:
        """Counters since the start or the last `recorder.reset()`."""
        memory, prefixes = self.memory, self.memory.prefixes
        return self.recorder.stats(
            pages_free=memory.available,
            pages_idle=memory.pool.idle,
            pages_total=memory.pool.num_pages,
            optimal_tokens=self.optimum.tokens if self.optimum is not None else None,
            evictions=prefixes.evictions if prefixes is not None else 0,
        )

    def reset_stats(self) -> None:
        """Begin counting anew."""
        self.recorder.reset()
        self.drafting.reset_stats()
        if self.optimum is not None:
            self.optimum.tokens = 0
        if self.memory.prefixes is not None:
            self.memory.prefixes.evictions = 0

    def forget(self, identity: str = "") -> None:
        """Forget all KV: the model is not what it was. Rows that run compute theirs again.

        Where it is broken off, it must be repeated.

        Args:
            identity: by which tiers are to know its KV from now on.
        """
        with self._mending():
            self.roster.forget()
            self.drafting.forget()
            if self.second is not None:
                self.second.forget(identity)

    def check(self) -> None:
        """Verify the laws of memory, and that every sequence belongs to a running row."""
        self.roster.check()
        self.drafting.check()

    # -- parts of a step

    def _decide(self) -> Decision:
        settings, memory = self.settings, self.memory
        most = settings.max_batch_tokens, settings.max_sequences
        limits = Limits(*most, memory.available, memory.page_size, settings.max_logits)
        return decide(self.roster.running, self.roster.waiting(), limits, self.supply)

    def _apply(self, decision: Decision) -> None:
        for row in decision.preempted:
            self.roster.preempt(row)
            row.request.metrics.preemptions += 1
        now = time.perf_counter()
        for work in decision.admitted:
            if self.optimum is not None:
                self.optimum.admit(work.row)
            first = work.row.request.metrics.first_scheduled_time is None
            self.roster.admit(work.row, work.found, now)
            restored = self._restore(work.row)
            cached = work.row.sequence.computed
            self.recorder.add(cached_tokens=cached, restored_tokens=restored)
            if first:
                work.row.request.metrics.cached_tokens = cached
        self.recorder.add(preemptions=len(decision.preempted))

    def _restore(self, row: Row) -> int:
        """Tokens of a row just admitted whose KV came back from a second tier."""
        if self.second is None or not row.reuses:
            return 0
        return self.second.restore(row.sequence, self.recorder.tokens_per_second, row.reusable)

    def _reserve(self, decision: Decision) -> list[PlanRow]:
        """Pages for the work. Forks share pages, so `decide` had estimates: a row that gets none sits this step out."""
        copies, rows = [], []
        for work in decision.work:
            row, count = work.row, min(work.count, work.row.sequence.pending)
            if row.scores_prompt:  # KV that came back from a second tier since brings the places nearer that it scores
                count = min(count, self.settings.max_logits)
            try:
                if work.pages:
                    made = self.memory.reserve(row.sequence, count)
                    self.drafting.copied(made)
                    copies += made
            except OutOfPages:
                continue
            rows.append(PlanRow(row, row.sequence, count, row.logits_of(row.sequence.computed, count)))
        self.store.copy(copies)
        rows.sort(key=lambda planned: planned.count > 1)
        return rows

    def _forward(self, work: list[PlanRow]) -> torch.Tensor:
        plan = build_plan(work, self.memory.page_size, self.device, self.settings.backend)
        begun = time.perf_counter()
        logits = self.forward(plan)
        seconds = time.perf_counter() - begun
        self.recorder.forward(plan.tokens, seconds)
        self.drafting.forwarded(work, plan.tokens, seconds)
        return logits

    def _conclude(
        self, work: list[PlanRow], drafts: dict[PlanRow, Proposal], logits: torch.Tensor, result: StepResult
    ) -> None:
        """Draw what is complete, then commit and finish row by row."""
        note_prompts(work, logits)
        scored = note_scores(work, logits)
        drawings = rows_to_draw(work, drafts)
        # A look at all logits at once says for most steps that nothing is wrong.
        sound = not drafts or all_finite(logits)
        if not sound:
            drawings = self.outcomes.set_aside(drawings, logits)
        known = sum(w.count for w in work if w not in drafts and (w.count > 1 or not w.row.output_ids))
        for planned in work:
            if planned.sequence.open:
                self.memory.commit(planned.sequence, 1 if planned in drafts else planned.count)
        memory = self.memory
        self.recorder.memory(len(self.roster.running), memory.pool.held, memory.live_tokens)
        for drawing in drawings:  # all rows of a request share its prompt before any of them can end
            if drawing.row.sequence is None:
                self.roster.branch(drawing.row)
        before = len(result.ids)
        if drawings:
            draw(drawings, logits, partial(self.outcomes.take, result))
        if drafts:
            for row in [drawing.row for drawing in drawings if drawing.spoilt]:
                self.outcomes.compute_again(row)
            self.drafting.settle(work, drawings, logits, sound)
        for drawing in drawings:
            if drawing.row.finish_reason and drawing.row.sequence is not None:
                self.outcomes.finish(drawing.row)
        for row, error in scored:
            self.outcomes.finish_scored(row, error)
        self.roster.shed(self.settings.max_sequences)
        generated = len(result.ids) - before
        self.recorder.add(steps=1, rows=len(work), prompt_tokens=known, generated_tokens=generated)
