"""`hf-paged bench latency`: one request at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.peers import HfGenerate, Paged, Peer
from hf_paged.integrations.bench.result import Run
from hf_paged.integrations.bench.throughput import Progress, make_vllm, without_end_token
from hf_paged.integrations.bench.vllm_peer import NoVllm
from hf_paged.integrations.bench.workload import Workload


def run_latency(
    loaded: Loaded,
    load: Workload,
    names: Sequence[str],
    *,
    repeats: int,
    vllm_python: str | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time requests one after another, engines in turns within each request.

    Args:
        names: peers: `hf` (`generate` with its default cache, one row) and `vllm`.

    Returns:
        A report: for each engine the medians over all requests and rounds of the time to the first token
        (`ttft`), the time for each token after it (`tpot`) and of the whole request; `ratios` are hf_paged's
        times over the peer's.
    """
    progress = progress or Progress()
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(without_end_token(loaded.model))
        progress.note("starting the engines")
        peers: list[Peer] = [Paged(loaded.model, **(settings or {}))]
        stack.callback(peers[0].close)
        for name in names:
            try:
                peer = _make(name, loaded, load, vllm_python)
            except NoVllm as error:
                skipped[name] = str(error)
                continue
            peers.append(peer)
            stack.callback(peer.close)
        runs = _rounds(peers, load, repeats, progress)
    rows = [_row(peer.name, runs[peer.name]) for peer in peers]
    return {
        "benchmark": "latency",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "requests": len(load),
        "output_tokens": load.tokens,
        "repeats": repeats,
        "rows": rows,
        "ratios": {row["engine"]: _ratios(rows[0], row) for row in rows[1:]},
        "tokens_equal": {
            peer.name: [run.tokens for run in runs[peer.name]] == [run.tokens for run in runs["hf_paged"]]
            for peer in peers[1:]
        },
        "skipped": skipped,
        "machine": machine(),
    }


def _make(name: str, loaded: Loaded, load: Workload, vllm_python: str | None) -> Peer:
    if name == "hf":
        return HfGenerate(loaded.model, loaded.pad_id, sizes=(1,))
    return make_vllm(loaded, load, vllm_python)


def _rounds(peers: Sequence[Peer], load: Workload, repeats: int, progress: Progress) -> dict[str, list[Run]]:
    """One request, all engines; then the next request: what slows the machine slows all of them."""
    progress.plan(len(peers) * (1 + repeats * len(load)))
    for peer in peers:
        progress.note(f"{peer.name}: warm-up")
        peer.warm(load.only([0]))
        progress.done()
    runs: dict[str, list[Run]] = {peer.name: [] for peer in peers}
    for turn in range(repeats):
        progress.note(f"round {turn + 1} of {repeats}")
        for row in range(len(load)):
            for peer in peers:
                runs[peer.name].append(peer.run(load.only([row])))
                progress.done()
    return runs


def _row(engine: str, runs: Sequence[Run]) -> dict[str, Any]:
    tpot = [value for run in runs for value in run.tpot if value is not None]
    return {
        "engine": engine,
        "tokens": sum(len(run.tokens[0]) for run in runs),
        "seconds": statistics.median(run.seconds for run in runs),
        "ttft": statistics.median(run.ttft[0] for run in runs),
        "tpot": statistics.median(tpot) if tpot else None,
    }


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float | None]:
    names = ("ttft", "tpot", "seconds")
    return {name: ours[name] / theirs[name] if ours[name] and theirs[name] else None for name in names}
