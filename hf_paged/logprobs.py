"""Log-probabilities of sampled tokens and of prompt tokens, raw and processed."""

from collections.abc import Sequence

import torch

from hf_paged.outputs import TokenLogprob

_CHUNK = 1 << 22  # logits of given tokens are turned into log-probabilities this many numbers at a time


def token_logprobs(
    logits: torch.Tensor, scores: torch.Tensor, tokens: Sequence[int], k: int
) -> list[dict[int, TokenLogprob]]:
    """Describe the chosen token of each row and the row's k most probable ones.

    logits: float32 [n, V] as the model gave them. scores: float32 [n, V] as they were drawn from. tokens: n.
    k: 0 or more, -1 for the whole vocabulary. Returns n dicts; the chosen token comes first, then the others
    by falling raw log-probability.
    """
    raw = logits.log_softmax(dim=1)
    processed = raw if scores is logits else scores.log_softmax(dim=1)
    vocab = raw.shape[1]
    chosen = torch.as_tensor(tokens, dtype=torch.int64, device=raw.device)[:, None]
    own = raw.gather(1, chosen)
    ranks = (raw > own).sum(dim=1).add_(1).tolist()
    values, ids = raw.topk(vocab if k < 0 else min(k, vocab), dim=1)
    ids = torch.cat((chosen, ids), dim=1)
    values = torch.cat((own, values), dim=1).tolist()
    after = processed.gather(1, ids).tolist()
    return [_describe(*row) for row in zip(ids.tolist(), values, after, ranks, strict=True)]


def _describe(ids: list[int], raw: list[float], processed: list[float], rank: int) -> dict[int, TokenLogprob]:
    """First the chosen token with its rank, then the others, sorted, so that their rank is their place."""
    found = {ids[0]: TokenLogprob(ids[0], raw[0], processed[0], rank)}
    place = 1
    for i in range(1, len(ids)):
        if i > 1 and raw[i] != raw[i - 1]:
            place = i
        found.setdefault(ids[i], TokenLogprob(ids[i], raw[i], processed[i], place))
    return found


def prompt_logprobs(logits: torch.Tensor, next_ids: torch.Tensor, k: int) -> list[dict[int, TokenLogprob]]:
    """Log-probabilities of given tokens: what the model thought of each token of a prompt.

    logits: float32 [n, V] at n positions; next_ids: int64 [n], the token that followed each; k as in
    `token_logprobs`. Nothing is processed here, so raw and processed are the same. Returns n dicts.
    """
    if logits.dim() != 2 or next_ids.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(next_ids.shape)}"
        raise ValueError(f"logits and next_ids have shapes {shapes}: must be [n, vocabulary] and [n]")
    step = max(1, _CHUNK // logits.shape[1])
    found: list[dict[int, TokenLogprob]] = []
    for start in range(0, len(logits), step):
        part = logits[start : start + step].float()
        found += token_logprobs(part, part, next_ids[start : start + step].tolist(), k)
    return found


def chosen_logprobs(logits: torch.Tensor, lines: Sequence[int], ids: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Log-probabilities of given tokens alone, and whether each is the most probable one of its line.

    logits: float32 [n, V]. lines: m ascending indices of lines, each as often as tokens are asked of it; ids: m token
    ids. A line whose log-softmax is undefined (NaN, or infinite logits) gives NaN.
    """
    at = torch.tensor(lines, device=logits.device)
    used, owner = torch.unique_consecutive(at, return_inverse=True)
    chosen = torch.tensor(ids, device=logits.device)
    totals, best = logits.new_empty(len(used)), torch.empty_like(used)
    step = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(used), step):
        part = logits[used[start : start + step]]
        totals[start : start + step] = part.logsumexp(dim=1)
        best[start : start + step] = part.argmax(dim=1)
    totals.masked_fill_(~totals.isfinite(), torch.nan)
    own = logits[at, chosen] - totals[owner]
    return own.tolist(), (best[owner] == chosen).tolist()
