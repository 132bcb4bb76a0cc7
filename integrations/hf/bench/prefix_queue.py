"""Traces through scheduler and memory, without a model: what is found, in which order, from how large a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_paged.config import CoreSettings
from hf_paged.engine import EngineCore
from hf_paged.params import SamplingParams
from hf_paged.plan import StepPlan
from hf_paged.radix import RadixTree
from hf_paged.store import KVStore, LayerShape

# Width of the logits of a model that is not there; only token 0 is ever drawn.
WIDTH = 8


def _no_model(plan: StepPlan) -> torch.Tensor:
    logits = torch.zeros(len(plan.logits_at), WIDTH)
    logits[:, 0] = 1
    return logits


def unlimited_hits(prompts: Sequence[Sequence[int]], page_size: int) -> tuple[int, int]:
    """Tokens that a tree without limits finds, whatever the order, and pages that it then holds."""
    tree, hits = RadixTree(page_size), 0
    for prompt in prompts:
        hits += tree.match(prompt).length
        tree.insert(prompt, [0] * -(-len(prompt) // page_size))
    return hits, tree.nodes


def run_queue(
    prompts: Sequence[Sequence[int]],
    *,
    page_size: int,
    pool: float = 0.05,
    free_order: bool = True,
    max_batch_tokens: int = 512,
    max_sequences: int = 32,
) -> dict[str, Any]:
    """Serve prompts, one token each, and count what the tree finds.

    Args:
        prompts: token ids (or ids of blocks, with pages of one).
        pool: pages, as a share of those that all prompts need together, but never too few for the longest.
        free_order: as a list that is answered as a whole; else in order of arrival.
    """
    optimum, working_set = unlimited_hits(prompts, page_size)
    longest = max(-(-(len(prompt) + 1) // page_size) for prompt in prompts)
    pages = max(int(pool * working_set), longest + 1)
    vocab = max(map(max, prompts)) + WIDTH
    settings = CoreSettings(max_batch_tokens, max_sequences, 1 << 40, vocab, prefix_caching=True)
    core = EngineCore(_no_model, KVStore([LayerShape(1, 1, 1)], pages, page_size), settings)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    requests = [core.submit(prompt, params, seed=0) for prompt in prompts]
    if free_order:
        core.arrange(requests)
    hits = 0
    while core.has_work:
        hits += sum(request.metrics.cached_tokens for request in core.step().finished)
    total = sum(map(len, prompts))
    return {
        "requests": len(prompts),
        "tokens": total,
        "page_size": page_size,
        "pages": pages,
        "working_set": working_set,
        "hits": hits,
        "unlimited_hits": optimum,
        "hit_rate": hits / total,
        "unlimited_hit_rate": optimum / total,
        "of_unlimited": hits / optimum if optimum else 1.0,
        "preemptions": core.stats().preemptions,
        "free_order": free_order,
    }
