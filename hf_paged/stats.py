"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from hf_paged.radix import RadixTree
from hf_paged.request import Row


@dataclass(frozen=True)
class EngineStats:
    """What an engine did since it was made or `reset_stats` was called.

    Attributes:
        steps: forwards.
        forward_seconds: time in the model's forward, logits included.
        step_seconds: time in `step` in all.
        prompt_tokens: tokens computed that were known before (prompts, and what preemption computes again).
        cached_tokens: tokens that rows began with, because their KV was in the prefix cache.
        optimal_tokens: tokens that rows would have begun with, had nothing ever been evicted (None: not tracked).
        generated_tokens: tokens sampled.
        rows: rows computed, summed over steps (over `steps`: the mean batch).
        preemptions: rows that gave up their pages.
        evictions: pages that the prefix cache gave up to make room.
        restored_tokens: of `cached_tokens`, those whose KV came back from a second tier.
        peak_running: rows that held pages at once.
        peak_pages: pages in use at once.
        page_bytes: bytes of one page over all layers.
        peak_live_bytes: most bytes that stored tokens needed at once.
        kv_waste: share of the slots of pages in use that held no live token; mean over steps, weighted by pages.
        pages_free: pages that can be handed out now, `pages_idle` included.
        pages_idle: pages that only the prefix cache holds.
        pages_total: pages of the pool.
    """

    steps: int = 0
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    optimal_tokens: int | None = None
    generated_tokens: int = 0
    rows: int = 0
    preemptions: int = 0
    evictions: int = 0
    restored_tokens: int = 0
    peak_running: int = 0
    peak_pages: int = 0
    page_bytes: int = 0
    peak_live_bytes: int = 0
    kv_waste: float = 0.0
    pages_free: int = 0
    pages_idle: int = 0
    pages_total: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were cached, 0 to 1."""
        known = self.cached_tokens + self.prompt_tokens
        return self.cached_tokens / known if known else 0.0

    @property
    def overhead(self) -> float:
        """Share of the step time spent outside the model's forward, 0 to 1."""
        return 1 - self.forward_seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def kv_bytes_peak(self) -> int:
        """Bytes of the pages that were in use at the peak."""
        return self.peak_pages * self.page_bytes


LONG_STEP = 64
COUNTED = ("steps", "prompt_tokens", "cached_tokens", "generated_tokens", "rows", "preemptions", "restored_tokens")


class Recorder:
    """Adds up what steps report."""

    def __init__(self, page_bytes: int, page_size: int) -> None:
        self.page_bytes, self.page_size = page_bytes, page_size
        self.reset()

    def reset(self) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self.forward_seconds = self.step_seconds = 0.0
        self.peak_running = self.peak_pages = self.peak_live = 0
        self._slots = self._empty = 0
        self.tokens_per_second: float | None = None  # of steps long enough to tell

    def add(self, **counts: int) -> None:
        for name, value in counts.items():
            self.counts[name] += value

    def forward(self, tokens: int, seconds: float) -> None:
        """Note a forward over `tokens` tokens."""
        self.forward_seconds += seconds
        if tokens >= LONG_STEP and seconds > 0:
            latest, before = tokens / seconds, self.tokens_per_second
            self.tokens_per_second = latest if before is None else before + (latest - before) / 4

    def memory(self, running: int, used_pages: int, live_tokens: int) -> None:
        """Note pages in use and distinct live tokens in them, once a step."""
        self.peak_running = max(self.peak_running, running)
        self.peak_pages = max(self.peak_pages, used_pages)
        slots = used_pages * self.page_size
        self.peak_live = max(self.peak_live, min(live_tokens, slots))
        self._slots += slots
        self._empty += slots - min(live_tokens, slots)

    def stats(self, **now: int | None) -> EngineStats:
        """All counters; `now`: fields that are not counted here."""
        return EngineStats(
            **self.counts,
            forward_seconds=self.forward_seconds,
            step_seconds=self.step_seconds,
            peak_running=self.peak_running,
            peak_pages=self.peak_pages,
            page_bytes=self.page_bytes,
            peak_live_bytes=self.peak_live * self.page_bytes // self.page_size,
            kv_waste=self._empty / self._slots if self._slots else 0.0,
            **now,
        )


class Optimum:
    """What a prefix cache that never evicts would have had: tokens of all prompts and answers so far.

    It grows with everything that is served: meant for benchmarks.
    """

    def __init__(self, page_size: int) -> None:
        self.tree = RadixTree(page_size)
        self.tokens = 0

    def admit(self, row: Row) -> None:
        """Count what `row` would find. What it computes is known from now on: others would wait for it."""
        if row.shared:
            self.tokens += self.tree.match(row.tokens, row.salt).length if row.reuses else 0
            self._note(row.tokens, row.salt)

    def finish(self, row: Row) -> None:
        """The row's answer is known too (its last token has no KV)."""
        if row.shared:
            self._note(row.tokens[:-1], row.salt)

    def _note(self, tokens: list[int], salt: str | None) -> None:
        self.tree.insert(tokens, [0] * -(-len(tokens) // self.tree.page_size), salt)
