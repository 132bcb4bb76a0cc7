"""The engines that a benchmark compares, each behind the same three calls: `warm`, `run`, `close`."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from hf_paged.integrations.bench.result import Run, per_token
from hf_paged.integrations.bench.workload import Workload

BATCH_SIZES = (8, 16, 32)


class Peer(Protocol):
    """An engine that can be timed."""

    name: str

    def warm(self, load: Workload) -> None:
        """Make ready: compile, allocate, choose settings. Not timed."""

    def run(self, load: Workload) -> Run:
        """Answer all requests; greedy, each making exactly its number of tokens."""

    def close(self) -> None:
        """Give back what it holds."""


class Paged:
    """hf_paged's engine, with its own defaults unless settings are given. Nothing is kept from run to run."""

    def __init__(self, model: Any, name: str = "hf_paged", **settings: Any) -> None:
        from hf_paged import Engine

        self.name, self.engine = name, Engine(model, **settings)

    def warm(self, load: Workload) -> None:
        self.run(load)

    def run(self, load: Workload) -> Run:
        from hf_paged import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in load.lengths]
        self.engine.forget()
        self.engine.reset_stats()
        start = time.perf_counter()
        outputs = self.engine.generate([list(prompt) for prompt in load.prompts], params)
        seconds = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
        stats = self.engine.stats()
        firsts = [output.metrics.first_token_time for output in outputs]
        lasts = [output.metrics.finished_time for output in outputs]
        tpot = [per_token(first, last, n) for first, last, n in zip(firsts, lasts, load.lengths, strict=True)]
        detail = {
            "steps": stats.steps,
            "rows_per_step": stats.rows / max(1, stats.steps),
            "outside_forward": stats.overhead,
            "kv_peak_bytes": stats.kv_bytes_peak,
            "kv_live_peak_bytes": stats.peak_live_bytes,
            "preemptions": stats.preemptions,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "evictions": stats.evictions,
        }
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return Run(tokens, seconds, [first - start for first in firsts], tpot, stats.kv_waste, detail)

    def close(self) -> None:
        self.engine.close()


class Stamps:
    """A logits processor that changes nothing and notes when each forward was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


class HfGenerate:
    """`model.generate`, left-padded batches in order of arrival, at the best of some batch sizes.

    A batch runs to the longest length in it; only the tokens that a row was asked for count.
    """

    name = "hf"

    def __init__(self, model: Any, pad_id: int, sizes: tuple[int, ...] = BATCH_SIZES) -> None:
        self.model, self.pad_id = model, pad_id
        self.sizes, self.size = sizes, sizes[-1]
        self.rates: dict[int, float] = {}

    def warm(self, load: Workload) -> None:
        """Find the best batch size with the whole workload; a first small batch warms the kernels up."""
        self._batch(load.only(range(min(len(load), 4))))
        if len(self.sizes) == 1:
            return
        for size in self.sizes:
            self.size = size
            if size <= len(load) or not self.rates:
                self.rates[size] = load.tokens / self.run(load).seconds
        self.size = max(self.rates, key=self.rates.__getitem__)

    def run(self, load: Workload) -> Run:
        tokens: list[list[int]] = []
        ttft: list[float] = []
        tpot: list[float | None] = []
        held = live = 0
        start = time.perf_counter()
        for first in range(0, len(load), self.size):
            part = load.only(range(first, min(first + self.size, len(load))))
            made, stamps = self._batch(part)
            tokens += made
            ttft += [stamps[0] - start] * len(part)
            tpot += [per_token(stamps[0], stamps[n - 1], n) for n in part.lengths]
            slots, used = _padded_slots(part)
            held, live = held + slots, live + used
        seconds = time.perf_counter() - start
        detail = {"batch_size": self.size, "rates_of_batch_sizes": dict(self.rates)}
        return Run(tokens, seconds, ttft, tpot, 1 - live / held, detail)

    def _batch(self, part: Workload) -> tuple[list[list[int]], list[float]]:
        width = max(map(len, part.prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in part.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part.prompts])
        stamps = Stamps()
        out = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max(part.lengths),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self.pad_id,
            logits_processor=[stamps],
        )
        rows = out[:, width:].tolist()
        return [row[:n] for row, n in zip(rows, part.lengths, strict=True)], stamps.times

    def close(self) -> None:
        pass


def _padded_slots(part: Workload) -> tuple[int, int]:
    """KV slots that a left-padded batch holds and that its live tokens need, summed over its steps."""
    width, steps = max(map(len, part.prompts)), max(part.lengths)
    held = len(part) * (steps * width + steps * (steps - 1) // 2)
    live = sum(n * len(prompt) + n * (n - 1) // 2 for prompt, n in zip(part.prompts, part.lengths, strict=True))
    return held, live


class HfContinuous:
    """transformers' continuous batching: what `generate_batch` runs, with a length for each request.

    `generate_batch` takes one `max_new_tokens` for all; its manager takes one for each request, which spares
    it the tokens that nobody asked for. The manager is made and warmed before the clock starts, as it is for
    a server.
    """

    name = "hf-cb"

    def __init__(self, model: Any, **settings: Any) -> None:
        """Args: settings: of transformers' `ContinuousBatchingConfig`; none leaves all to its authors."""
        self.model, self.settings = model, settings

    def warm(self, load: Workload) -> None:
        self.run(load)

    def run(self, load: Workload) -> Run:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        config = GenerationConfig(do_sample=False, max_new_tokens=max(load.lengths), eos_token_id=-1)
        hints = WorkloadHints(max(map(len, load.prompts)), max(load.lengths), len(load))
        with self.model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**self.settings),
            workload_hints=hints,
            warmup=True,
            timeout=30,
        ) as manager:
            start = time.perf_counter()
            names = [
                manager.add_request(list(prompt), max_new_tokens=n, eos_token_id=-1, record_timestamps=True)
                for prompt, n in zip(load.prompts, load.lengths, strict=True)
            ]
            results = self._collect(manager, len(names))
            seconds = time.perf_counter() - start
        done = [results[name] for name in names]
        times = [result.timestamps for result in done]
        tpot = [per_token(stamp[0], stamp[-1], len(stamp)) for stamp in times]
        return Run([list(r.generated_tokens) for r in done], seconds, [t[0] - start for t in times], tpot)

    def _collect(self, manager: Any, count: int) -> dict[str, Any]:
        results: dict[str, Any] = {}
        while len(results) < count:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
                results[result.request_id] = result
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before all requests were done")
        return results

    def close(self) -> None:
        pass
