"""`hf-paged bench eval`: a dataset through `generate_dataset`, and through transformers' pipeline."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.equality import compare
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.memory import resident
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.workload import Workload

FIRST = 100  # rows after which memory should not grow any more


@dataclass
class Watch:
    """Told of a run's progress: resident memory, in bytes, at row `FIRST` and at its most from then on."""

    first: int | None = None
    most: int = 0
    notes: list[tuple[int, int]] = field(default_factory=list)

    def update(self, glance: Any) -> None:
        now = resident()
        self.notes.append((glance.written, now))
        if glance.written >= FIRST:
            self.first = self.first if self.first is not None else now
            self.most = max(self.most, now)

    begin = end = update

    @property
    def growth(self) -> int | None:
        """Bytes; None where there were too few rows."""
        return None if self.first is None else self.most - self.first


def through_engine(loaded: Loaded, prompts: list[str], new_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One run into a fresh directory, by an engine of its own, which is made in the time that counts."""
    from hf_paged.integrations.datasets import generate_dataset, read_rows

    watch = Watch()
    rows = [{"prompt": prompt} for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        summary = generate_dataset(
            loaded.model,
            rows,
            Path(folder) / "out",
            tokenizer=loaded.tokenizer,
            max_tokens=new_tokens,
            progress=watch,
            **settings,
        )
        seconds = time.perf_counter() - begun
        written = sorted(read_rows(Path(folder) / "out"), key=lambda row: row["row"])
    wrong = [row["error"] for row in written if row["error"] is not None]
    if wrong:
        raise RuntimeError(f"{len(wrong)} rows failed: {wrong[0]}")
    return {
        "seconds": seconds,
        "tokens": [row["token_ids"] for row in written],
        "outside_engine": summary.outside_engine,
        "hit_rate": summary.hit_rate,
        "mean_batch": summary.mean_batch,
        "kv_peak_bytes": summary.kv_peak_bytes,
        "rss_growth_bytes": watch.growth,
        "rss_bytes": watch.notes,
    }


def through_pipeline(loaded: Loaded, prompts: list[str], new_tokens: int, batch_size: int) -> dict[str, Any]:
    """One call of `pipeline("text-generation")` with the default cache."""
    from transformers import pipeline

    pipe = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer, device=loaded.model.device)
    begun = time.perf_counter()
    answers = pipe(prompts, batch_size=batch_size, max_new_tokens=new_tokens, do_sample=False, return_tensors=True)
    seconds = time.perf_counter() - begun
    ends = loaded.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    lengths = [len(ids) for ids in loaded.tokenizer(prompts)["input_ids"]]
    rows = [answer[0]["generated_token_ids"] for answer in answers]
    return {
        "seconds": seconds,
        "tokens": [_made(r, n, loaded.pad_id, ends) for r, n in zip(rows, lengths, strict=True)],
    }


def _made(row: list[int], length: int, pad: int, ends: set[int | None]) -> list[int]:
    """What was generated behind a left-padded prompt of `length` tokens, up to the token that ends it."""
    first = next(i for i, token in enumerate(row) if token != pad)
    made = list(row[first + length :])
    return made[: next((i + 1 for i, token in enumerate(made) if token in ends), len(made))]


def run_eval(
    loaded: Loaded,
    prompts: list[str],
    *,
    new_tokens: int,
    batch_size: int,
    repeats: int,
    peer_rows: int | None,
    settings: dict[str, Any],
    progress: Any,
) -> dict[str, Any]:
    """Both in turns; medians of rows a second count.

    Args:
        prompts: whole texts.
        peer_rows: rows that the pipeline gets, from the first; None: all.
        settings: of `EngineConfig`.
    """
    few = prompts[: peer_rows or len(prompts)]
    progress.plan(2 * repeats + 2)
    progress.note("warm-up")
    through_engine(loaded, prompts[: 2 * batch_size], new_tokens, settings)
    progress.done()
    through_pipeline(loaded, prompts[:batch_size], new_tokens, batch_size)
    progress.done()
    ours, theirs = [], []
    for turn in range(repeats):
        progress.note(f"hf_paged: run {turn + 1} of {repeats}")
        ours.append(through_engine(loaded, prompts, new_tokens, settings))
        progress.done()
        progress.note(f"pipeline: run {turn + 1} of {repeats}")
        theirs.append(through_pipeline(loaded, few, new_tokens, batch_size))
        progress.done()
    return {
        "benchmark": "eval",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "machine": machine(),
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    } | figures(loaded, prompts, few, new_tokens, ours, theirs)


def figures(
    loaded: Loaded, prompts: list[str], few: list[str], new_tokens: int, ours: list[dict], theirs: list[dict]
) -> dict[str, Any]:
    """What runs over `prompts`, and the pipeline's over `few`, come to."""
    ids = loaded.tokenizer(few)["input_ids"]
    load = Workload(tuple(map(tuple, ids)), (new_tokens,) * len(few))
    mine = statistics.median(len(prompts) / run["seconds"] for run in ours)
    peer = statistics.median(len(few) / run["seconds"] for run in theirs)
    first = ours[0]
    return {
        "requests": len(prompts),
        "peer_requests": len(few),
        "prompt_tokens": sum(map(len, ids)) / len(ids),
        "rows_per_second": mine,
        "peer_rows_per_second": peer,
        "ratio": mine / peer,
        "seconds_of_runs": {"hf_paged": [r["seconds"] for r in ours], "pipeline": [r["seconds"] for r in theirs]},
        **compare(loaded.model, load, theirs[0]["tokens"], first["tokens"][: len(few)]),
        **{name: value for name, value in first.items() if name not in ("tokens", "seconds")},
        "same_in_every_run": all(run["tokens"] == first["tokens"] for run in ours),
    }
