"""Peers of `hf-paged bench speculation`: transformers' assisted generation, vLLM's n-gram speculation; greedy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.throughput import Progress, make_vllm
from hf_paged.integrations.bench.vllm_peer import Vllm
from hf_paged.integrations.bench.workload import Workload

LOOKUP_TOKENS = 10  # transformers' own default
# As many drafts and as long n-grams as `SpeculationConfig` has by default.
VLLM_NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def summary_row(
    name: str, batch: int, load: Workload, seconds: Sequence[float], plain: float | None, equal: bool
) -> dict[str, Any]:
    """The row of an engine in the report; `plain`: seconds of hf_paged without drafts at this batch size."""
    median = statistics.median(seconds)
    return {
        "engine": name,
        "batch": batch,
        "seconds": median,
        "tokens_per_second": load.tokens / median,
        "speedup": plain / median if plain else None,
        "tokens_equal": equal,
    }


def transformers_rows(
    loaded: Loaded,
    draft: Any,
    load: Workload,
    wanted: list[list[int]],
    repeats: int,
    plain: float | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """transformers' loop, its assisted generation and its prompt lookup, one row at a time, in turns.

    Args:
        wanted: the tokens that are right. plain: seconds of hf_paged without drafts at batch size 1.
    """
    ways: dict[str, dict[str, Any]] = {"hf": {}, "hf lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS}}
    if draft is not None:
        ways["hf assisted"] = {"assistant_model": draft}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    equal = dict.fromkeys(ways, True)
    for _ in range(repeats):
        for name, extra in ways.items():
            progress.note(f"transformers, {name}")
            begun = time.perf_counter()
            made = [_generate(loaded, list(p), n, extra) for p, n in zip(load.prompts, load.lengths, strict=True)]
            seconds[name].append(time.perf_counter() - begun)
            equal[name] &= made == wanted
    return [summary_row(name, 1, load, seconds[name], plain, equal[name]) for name in ways]


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


def vllm_rows(
    loaded: Loaded,
    load: Workload,
    wanted: list[list[int]],
    batches: Sequence[int],
    repeats: int,
    plain: dict[int, float],
    python: str,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """vLLM with n-gram speculation and without, one behind the other, so that neither disturbs the other.

    Args:
        plain: seconds of hf_paged without drafts, by batch size.

    Returns:
        rows, and why a way cannot run: by its name the last line of what it said.
    """
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name, speculation in (("vllm", None), ("vllm ngram", VLLM_NGRAM)):
        progress.note(f"{name}: starting")
        try:
            peer = make_vllm(loaded, load, python, speculation)
            try:
                for batch in batches:
                    progress.note(f"batch {batch}, {name}")
                    rows.append(_vllm_row(peer, name, load, wanted, batch, repeats, plain.get(batch)))
            finally:
                peer.close()
        except RuntimeError as error:
            skipped[name] = str(error).strip().splitlines()[-1]
    return rows, skipped


def _vllm_row(
    peer: Vllm, name: str, load: Workload, wanted: list[list[int]], batch: int, repeats: int, plain: float | None
) -> dict[str, Any]:
    """The median of `repeats` runs behind one that is not counted."""
    parts = [load.only(range(first, min(first + batch, len(load)))) for first in range(0, len(load), batch)]
    for part in parts:
        peer.warm(part)
    seconds, equal = [], True
    for _ in range(repeats):
        runs = [peer.run(part) for part in parts]
        seconds.append(sum(run.seconds for run in runs))
        equal &= [ids for run in runs for ids in run.tokens] == wanted
    return summary_row(name, batch, load, seconds, plain, equal) | {"version": peer.version}
