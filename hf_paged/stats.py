"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What an engine did since it was made or `reset_stats` was called.

    Attributes:
        steps: forwards.
        forward_seconds: time in the model's forward, logits included.
        step_seconds: time in `step` in all.
        prompt_tokens: tokens computed that were known before (prompts, and what preemption computes again).
        generated_tokens: tokens sampled.
        rows: rows computed, summed over steps (over `steps`: the mean batch).
        preemptions: rows that gave up their pages.
        peak_running: rows that held pages at once.
        peak_pages: pages in use at once.
        page_bytes: bytes of one page over all layers.
        peak_live_bytes: most bytes that stored tokens needed at once.
        kv_waste: share of the slots of pages in use that held no live token; mean over steps, weighted by pages.
        pages_free: pages that can be handed out now.
        pages_total: pages of the pool.
    """

    steps: int = 0
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    rows: int = 0
    preemptions: int = 0
    peak_running: int = 0
    peak_pages: int = 0
    page_bytes: int = 0
    peak_live_bytes: int = 0
    kv_waste: float = 0.0
    pages_free: int = 0
    pages_total: int = 0

    @property
    def overhead(self) -> float:
        """Share of the step time spent outside the model's forward, 0 to 1."""
        return 1 - self.forward_seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def kv_bytes_peak(self) -> int:
        """Bytes of the pages that were in use at the peak."""
        return self.peak_pages * self.page_bytes


class Recorder:
    """Adds up what steps report."""

    def __init__(self, page_bytes: int, page_size: int) -> None:
        self.page_bytes, self.page_size = page_bytes, page_size
        self.reset()

    def reset(self) -> None:
        self.counts = dict.fromkeys(("steps", "prompt_tokens", "generated_tokens", "rows", "preemptions"), 0)
        self.forward_seconds = self.step_seconds = 0.0
        self.peak_running = self.peak_pages = self.peak_live = 0
        self._slots = self._empty = 0

    def add(self, **counts: int) -> None:
        for name, value in counts.items():
            self.counts[name] += value

    def memory(self, running: int, used_pages: int, live_tokens: int) -> None:
        """Note pages in use and distinct live tokens in them, once a step."""
        self.peak_running = max(self.peak_running, running)
        self.peak_pages = max(self.peak_pages, used_pages)
        slots = used_pages * self.page_size
        self.peak_live = max(self.peak_live, min(live_tokens, slots))
        self._slots += slots
        self._empty += slots - min(live_tokens, slots)

    def stats(self, pages_free: int, pages_total: int) -> EngineStats:
        return EngineStats(
            **self.counts,
            forward_seconds=self.forward_seconds,
            step_seconds=self.step_seconds,
            peak_running=self.peak_running,
            peak_pages=self.peak_pages,
            page_bytes=self.page_bytes,
            peak_live_bytes=self.peak_live * self.page_bytes // self.page_size,
            kv_waste=self._empty / self._slots if self._slots else 0.0,
            pages_free=pages_free,
            pages_total=pages_total,
        )
