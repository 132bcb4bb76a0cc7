"""Are an engine's tokens those that `generate` gives to each row alone?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_paged.integrations.bench.workload import Workload


def generate_alone(model: Any, load: Workload, pad_id: int, done: Callable[[], None]) -> list[list[int]]:
    """Greedy tokens of each row by `model.generate` with its default cache, one row at a time.

    Args:
        done: called after each row.
    """
    rows = []
    for prompt, length in zip(load.prompts, load.lengths, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=pad_id,
        )
        rows.append(out[0, len(prompt) :].tolist())
        done()
    return rows


def compare(model: Any, load: Workload, reference: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
    """Hold tokens against the reference.

    Returns:
        tokens_equal, rows_differing, and for each differing row (`differences`): its number, where it first
        differs, and how far the reference's two best logits lie apart there. A gap near the resolution of the
        dtype means that two tokens were tied, and the order of summation decided.
    """
    differences = []
    for row, (want, got) in enumerate(zip(reference, tokens, strict=True)):
        if want == got:
            continue
        pairs = zip(want, got, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(want), len(got)))
        gap = top_gap(model, [*load.prompts[row], *want[:place]])
        differences.append({"row": row, "position": place, "top2_gap": gap})
    return {"tokens_equal": not differences, "rows_differing": len(differences), "differences": differences}


@torch.inference_mode()
def top_gap(model: Any, ids: list[int]) -> float:
    """Distance of the two best logits for the token after `ids`."""
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
    best, second = logits.topk(2).values.tolist()
    return best - second
