"""`hf-paged bench prefix`: many questions under one header, with the radix tree, without it, and by `generate`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from random import Random
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.bench.equality import compare
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.peers import HfGenerate, Paged, Peer
from hf_paged.integrations.bench.result import Run, summary
from hf_paged.integrations.bench.throughput import Progress, without_end_token
from hf_paged.integrations.bench.turns import take_turns
from hf_paged.integrations.bench.workload import Workload
from hf_paged.radix import RadixTree

WITHOUT = "no tree"


def few_shot(tokenizer: Any, shots: str, questions: Sequence[str], length: int, limit: int | None) -> Workload:
    """Every question behind the same header, cut at its beginning so that the longest row fits the model.

    Raises:
        BadInput: if even the questions alone do not fit.
    """
    header = list(tokenizer(shots)["input_ids"])
    asked = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in questions]
    room = (limit or 1 << 60) - length - max(map(len, asked))
    if room < 1:
        raise BadInput(f"a question of {max(map(len, asked))} tokens and {length} more do not fit {limit} positions")
    header = header[-room:]
    return Workload(tuple((*header, *ids) for ids in asked), (length,) * len(asked))


def unlike(load: Workload, vocab_size: int, seed: int = 0) -> Workload:
    """A workload of the same shape with random prompts: they have nothing in common."""
    rng = Random(seed)
    prompts = tuple(tuple(rng.randrange(vocab_size) for _ in prompt) for prompt in load.prompts)
    return Workload(prompts, load.lengths)


def optimal_computed(prompts: Sequence[Sequence[int]]) -> int:
    """Prompt tokens that must be computed when nothing is computed twice: in each prompt at least the last."""
    tree, computed = RadixTree(1), 0
    for prompt in prompts:
        computed += len(prompt) - tree.match(prompt).length
        tree.insert(prompt, [0] * len(prompt))
    return computed


def run_prefix(
    loaded: Loaded,
    load: Workload,
    *,
    repeats: int,
    with_generate: bool = True,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the engine with and without its tree, and `generate`, in turns; the tree is empty before every run.

    Returns:
        A report: `rows` (one an engine), `ratios` (speed with the tree over each other's), computed prompt tokens over
        the optimum, and the cost of the tree where nothing is shared.
    """
    progress = progress or Progress()
    with ExitStack() as stack:
        stack.enter_context(without_end_token(loaded.model))
        peers: list[Peer] = [
            Paged(loaded.model, **(settings or {})),
            Paged(loaded.model, WITHOUT, prefix_caching=False, **(settings or {})),
        ]
        for peer in peers:
            stack.callback(peer.close)
        if with_generate:
            peers.append(HfGenerate(loaded.model, loaded.pad_id))
        progress.plan(len(peers) * (1 + repeats) + 2 * (1 + 2 * repeats))
        runs = take_turns(peers, load, repeats, progress.note, progress.done)
        overhead = _overhead(peers[:2], unlike(load, loaded.model.config.vocab_size), repeats, progress)
    rows = [summary(name, done) for name, done in runs.items()]
    for row, done in zip(rows, runs.values(), strict=True):
        row.update(compare(loaded.model, load, runs[WITHOUT][0].tokens, done[-1].tokens))
    best = optimal_computed(load.prompts)
    computed = rows[0]["detail"]["prompt_tokens"]
    return {
        "benchmark": "prefix",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "requests": len(load),
        "prompt_tokens": sum(map(len, load.prompts)),
        "output_tokens": load.tokens,
        "repeats": repeats,
        "rows": rows,
        "ratios": {row["engine"]: row["seconds"] / rows[0]["seconds"] for row in rows[1:]},
        "computed_tokens": computed,
        "optimal_tokens": best,
        "computed_over_optimal": computed / best,
        "no_hits": overhead,
        "machine": machine(),
    }


def _overhead(peers: Sequence[Peer], load: Workload, repeats: int, progress: Progress) -> dict[str, Any]:
    """Time with the tree over time without, where no prompt shares anything: the median over pairs of runs."""
    ratios = []
    for peer in peers:
        peer.warm(load)
        progress.done()
    for turn in range(2 * repeats):
        progress.note(f"nothing shared: pair {turn + 1} of {2 * repeats}")
        order = peers if turn % 2 else peers[::-1]
        runs: dict[str, Run] = {peer.name: peer.run(load) for peer in order}
        ratios.append(runs[peers[0].name].seconds / runs[peers[1].name].seconds)
        progress.done()
    return {"slowdown": statistics.median(ratios), "of_pairs": ratios}
