"""`hf-paged bench speculation`: drafting in all its ways against none, over batch sizes, tokens held equal."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.throughput import Progress, without_end_token
from hf_paged.integrations.bench.workload import Workload

PLAIN = "off"
WITH_DRAFT = ("draft", "auto")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; request `i` has seed `seed + i`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False)
class Variant:
    """An engine with one way to draft, and what its runs gave."""

    name: str
    engine: Any
    seconds: list[float] = field(default_factory=list)
    equal: bool = True

    def run(self, load: Workload, batch: int, sampling: Sampling) -> list[list[int]]:
        """Answer all requests, `batch` at a time."""
        from hf_paged import SamplingParams

        tokens = []
        begun = time.perf_counter()
        for first in range(0, len(load), batch):
            rows = range(first, min(first + batch, len(load)))
            params = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed + i,
                    max_tokens=load.lengths[i],
                    ignore_eos=True,
                )
                for i in rows
            ]
            outputs = self.engine.generate([list(load.prompts[i]) for i in rows], params, raise_errors=True)
            tokens += [list(output.outputs[0].token_ids) for output in outputs]
        self.seconds.append(time.perf_counter() - begun)
        return tokens

    def row(self, load: Workload, batch: int, plain: float) -> dict[str, Any]:
        seconds, stats = statistics.median(self.seconds), self.engine.speculation_stats()
        steps = self.engine.stats()
        return {
            "engine": self.name,
            "batch": batch,
            "seconds": seconds,
            "tokens_per_second": load.tokens / seconds,
            "speedup": plain / seconds,
            "tokens_equal": self.equal,
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
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time all ways of drafting in turns, batch size by batch size; `suffix` has seen other answers to the prompts
    (of another seed) before the clock starts, the others have been warmed the same way.

    Args:
        draft: the draft model, for `draft` and `auto`, or None.
        peers: also transformers' own assisted generation and prompt lookup, a row at a time (greedy only).

    Returns:
        A report: a row for each engine and batch size, its speed over that of the engine without drafts.
    """
    sampling, progress = sampling or Sampling(), progress or Progress()
    rows: list[dict[str, Any]] = []
    wanted: list[list[int]] | None = None
    with without_end_token(loaded.model):
        progress.plan(len(batches) * (len(methods) + 1) * (repeats + 1))
        for batch in batches:
            variants = make_variants(loaded, draft, methods, settings or {})
            try:
                for variant in variants:
                    progress.note(f"batch {batch}, {variant.name}: warm-up")
                    variant.run(load, batch, Sampling(sampling.temperature, sampling.top_p, sampling.seed + 100_000))
                    variant.seconds.clear()
                    variant.engine.reset_stats()
                    progress.done()
                for _ in range(repeats):
                    for variant in variants:
                        progress.note(f"batch {batch}, {variant.name}")
                        gc.collect()
                        tokens = variant.run(load, batch, sampling)
                        wanted = tokens if wanted is None else wanted
                        variant.equal &= tokens == wanted
                        progress.done()
                plain = statistics.median(variants[0].seconds)
                rows += [variant.row(load, batch, plain) for variant in variants]
            finally:
                for variant in variants:
                    variant.engine.close()
        if peers and not sampling.temperature:
            rows += _transformers(loaded, draft, load, wanted, repeats, rows, progress)
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
        "machine": machine(),
    }


def _transformers(
    loaded: Loaded,
    draft: Any,
    load: Workload,
    wanted: list[list[int]],
    repeats: int,
    rows: list[dict[str, Any]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """transformers' loop, its assisted generation and its prompt lookup, one row at a time, in turns."""
    ways: dict[str, dict[str, Any]] = {"hf": {}, "hf lookup": {"prompt_lookup_num_tokens": 10}}
    if draft is not None:
        ways["hf assisted"] = {"assistant_model": draft}
    plain = next((row["seconds"] for row in rows if row["batch"] == 1 and row["engine"] == PLAIN), None)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    equal = dict.fromkeys(ways, True)
    for _ in range(repeats):
        for name, extra in ways.items():
            progress.note(f"transformers, {name}")
            begun = time.perf_counter()
            made = [_generate(loaded, list(p), n, extra) for p, n in zip(load.prompts, load.lengths, strict=True)]
            seconds[name].append(time.perf_counter() - begun)
            equal[name] &= made == wanted
    out = []
    for name, times in seconds.items():
        median = statistics.median(times)
        out.append(
            {
                "engine": name,
                "batch": 1,
                "seconds": median,
                "tokens_per_second": load.tokens / median,
                "speedup": plain / median if plain else None,
                "tokens_equal": equal[name],
            }
        )
    return out


def _generate(loaded: Loaded, prompt: list[int], count: int, extra: dict[str, Any]) -> list[int]:
    import torch

    ids = torch.tensor([prompt], device=loaded.model.device)
    out = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=loaded.pad_id,
        **extra,
    )
    return out[0, len(prompt) :].tolist()


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
        if not row["engine"].startswith("hf"):
            lines.setdefault(row["engine"], []).append((row["batch"], row["speedup"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="batch size", ylabel="speed, without drafts = 1", xscale="log", ylim=(0, None))
    axes.set_xticks(sorted({row["batch"] for row in report["rows"]}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.legend()
    figure.savefig(path, dpi=150)
