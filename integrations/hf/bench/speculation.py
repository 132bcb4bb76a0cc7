"""`hf-paged bench speculation`: drafting in all its ways against none, over batch sizes, tokens held equal."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_paged.integrations.bench.ceiling import Source
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.possible import Possible, lookup_sources
from hf_paged.integrations.bench.speculation_peers import summary_row, transformers_rows, vllm_rows
from hf_paged.integrations.bench.throughput import Progress, without_end_token
from hf_paged.integrations.bench.workload import Workload
from hf_paged.params import SamplingParams

PLAIN = "off"
WITH_DRAFT = ("draft", "auto")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; request `i` has seed `seed + i`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def params(self, load: Workload, i: int) -> SamplingParams:
        """Those of request `i`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed + i}
        return SamplingParams(**drawn, max_tokens=load.lengths[i], ignore_eos=True)


@dataclass(eq=False)
class Variant:
    """An engine with one way to draft, and what its runs gave."""

    name: str
    engine: Any
    seconds: list[float] = field(default_factory=list)
    prompt_seconds: float = 0.0
    equal: bool = True
    possible: Possible | None = None

    def plain(self) -> Plain:
        """Itself, as what drafting is held against."""
        stats = self.engine.stats()
        overhead = (stats.step_seconds - stats.forward_seconds) / max(stats.steps, 1)
        return Plain(statistics.median(self.seconds), self.prompt_seconds, overhead)

    def run(self, load: Workload, batch: int, sampling: Sampling) -> list[list[int]]:
        """Answer all requests, `batch` at a time."""
        tokens = []
        begun = time.perf_counter()
        for first in range(0, len(load), batch):
            rows = range(first, min(first + batch, len(load)))
            params = [sampling.params(load, i) for i in rows]
            outputs = self.engine.generate([list(load.prompts[i]) for i in rows], params, raise_errors=True)
            tokens += [list(output.outputs[0].token_ids) for output in outputs]
        self.seconds.append(time.perf_counter() - begun)
        return tokens

    def row(self, load: Workload, batch: int, plain: Plain) -> dict[str, Any]:
        """The report's row."""
        row = summary_row(self.name, batch, load, self.seconds, plain.seconds, self.equal)
        stats, steps = self.engine.speculation_stats(), self.engine.stats()
        row |= {
            "tokens_per_forward": stats.tokens_per_row,
            "proposed": stats.proposed,
            "accepted": stats.accepted,
            "proposers": {name: vars(one) for name, one in stats.proposers.items()},
            "draft_seconds": stats.draft_seconds,
            "verify_seconds": stats.verify_seconds,
            "other_seconds": stats.other_seconds,
            # The rest is bookkeeping: a perfect one would take no time.
            "in_forwards": (steps.forward_seconds + stats.draft_seconds) / max(steps.step_seconds, 1e-9),
        }
        if stats.proposers and self.possible.target:
            given = plain.prompt_seconds, plain.overhead, row["tokens_per_second"]
            row |= self.possible.row(load, len(self.seconds), *given)
        return row


@dataclass(frozen=True)
class Plain:
    """The engine without drafts at one batch size: seconds of a run, of its prompts alone, and of a step outside the
    forward."""

    seconds: float
    prompt_seconds: float
    overhead: float


def make_variants(loaded: Loaded, draft: Any, methods: Sequence[str], settings: dict[str, Any]) -> list[Variant]:
    """An engine that drafts nothing, and one for each method. Prefixes are not kept: only drafting differs."""
    from hf_paged import Engine

    made = [Variant(PLAIN, Engine(loaded.model, prefix_caching=False, **settings))]
    for method in methods:
        model = draft if method in WITH_DRAFT else None
        engine = Engine(loaded.model, prefix_caching=False, draft_model=model, speculation=method, **settings)
        made.append(Variant(method, engine))
    return made


def run_speculation(
    loaded: Loaded,
    draft: Any,
    load: Workload,
    methods: Sequence[str],
    *,
    batches: Sequence[int],
    repeats: int,
    sampling: Sampling | None = None,
    peers: bool = True,
    vllm_python: str | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time all ways of drafting in turns, batch size by batch size; `suffix` has seen other answers to the prompts
    (of another seed) before the clock starts, the others have been warmed the same way.

    Args:
        draft: the draft model, for `draft` and `auto`, or None.
        peers: also transformers' own assisted generation and prompt lookup, a row at a time (greedy only).
        vllm_python: an interpreter that has vLLM: also vLLM with its n-gram speculation and without (greedy only).

    Returns:
        A report: a row for each engine and batch size, its speed over that of the engine without drafts, and
        `best_tokens_per_second`, what the acceptance and the costs that it measured allow (see `ceiling`).
    """
    sampling, progress = sampling or Sampling(), progress or Progress()
    rows: list[dict[str, Any]] = []
    wanted: list[list[int]] | None = None
    skipped: dict[str, str] = {}
    with without_end_token(loaded.model):
        progress.plan(len(batches) * (len(methods) + 1) * (repeats + 1))
        texts = {}
        if "lookup" in methods:
            params = [sampling.params(load, i) for i in range(len(load))]
            texts["lookup"] = lookup_sources(loaded, load, params, settings or {})
        for batch in batches:
            variants = make_variants(loaded, draft, methods, settings or {})
            try:
                wanted = _take_turns(variants, load, batch, repeats, sampling, wanted, texts, progress)
                plain = variants[0].plain()
                rows += [variant.row(load, batch, plain) for variant in variants]
            finally:
                for variant in variants:
                    variant.engine.close()
        if not sampling.temperature:
            plains = {row["batch"]: row["seconds"] for row in rows if row["engine"] == PLAIN}
            if peers:
                rows += transformers_rows(loaded, draft, load, wanted, repeats, plains.get(1), progress)
            if vllm_python is not None:
                made, skipped = vllm_rows(loaded, load, wanted, batches, repeats, plains, vllm_python, progress)
                rows += made
    return {
        "benchmark": "speculation",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "requests": len(load),
        "output_tokens": load.tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repeats": repeats,
        "rows": rows,
        "skipped": skipped,
        "machine": machine(),
    }


def _take_turns(
    variants: Sequence[Variant],
    load: Workload,
    batch: int,
    repeats: int,
    sampling: Sampling,
    wanted: list[list[int]] | None,
    texts: dict[str, list[Source]],
    progress: Progress,
) -> list[list[int]]:
    """Warm all up, then time them in turns and hold their tokens against `wanted`.

    Returns:
        `wanted`, or the first run's tokens where that is None.
    """
    warm = Sampling(sampling.temperature, sampling.top_p, sampling.seed + 100_000)
    prompts = Workload(load.prompts, (1,) * len(load))
    for variant in variants:
        progress.note(f"batch {batch}, {variant.name}: warm-up")
        variant.run(load, batch, warm)
        variant.seconds.clear()
        if variant.name == PLAIN:
            for _ in range(repeats):
                variant.run(prompts, batch, warm)
            variant.prompt_seconds, variant.seconds = statistics.median(variant.seconds), []
        variant.engine.reset_stats()
        variant.possible = Possible(variant.engine, batch, texts.get(variant.name))
        progress.done()
    for _ in range(repeats):
        for variant in variants:
            progress.note(f"batch {batch}, {variant.name}")
            gc.collect()
            tokens = variant.run(load, batch, sampling)
            wanted = tokens if wanted is None else wanted
            variant.equal &= tokens == wanted
            progress.done()
    return wanted


def plot_speculation(report: dict[str, Any], path: str) -> None:
    """A picture of speed over batch size, over that without drafts.

    Raises:
        BadInput: matplotlib is not installed.
    """
    from hf_paged.integrations.bench.data import BadInput

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in report["rows"]:
        if not row["engine"].startswith(("hf", "vllm")):
            lines.setdefault(row["engine"], []).append((row["batch"], row["speedup"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="batch size", ylabel="speed, without drafts = 1", xscale="log", ylim=(0, None))
    axes.set_xticks(sorted({row["batch"] for row in report["rows"]}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.legend()
    figure.savefig(path, dpi=150)
