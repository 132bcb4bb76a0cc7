"""What SamplingParams themselves change in scores before temperature: bias, bans and penalties.

All are scattered into the batch at once. Repetition penalty: Keskar et al. 2019 (CTRL), on prompt and output;
presence and frequency penalties: OpenAI's definition, on the output only; as in vLLM.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from hf_paged.pipeline import token_tensor

if TYPE_CHECKING:
    from hf_paged.sampling import SamplingRow


def is_touched(row: "SamplingRow") -> bool:
    """Whether `adjust` would do anything to this row."""
    params = row.params
    return not params.plain or bool(row.bad_word_ids) or len(row.output_ids) < params.min_tokens


def adjust(scores: torch.Tensor, rows: Sequence["SamplingRow"], owned: bool) -> torch.Tensor:
    """Apply logit_bias, bad words, the min_tokens mask, then repetition, frequency and presence penalties.

    scores: float32 [S, V], one row for each of `rows`; written to if `owned`, else copied first if anything
    changes. Ids outside the vocabulary are passed over: they cannot be drawn. Returns float32 [S, V].
    """
    touched = [i for i, row in enumerate(rows) if is_touched(row)]
    if not touched:
        return scores
    scores = scores.contiguous() if owned else scores.clone(memory_format=torch.contiguous_format)
    flat, vocab = scores.view(-1), scores.shape[1]
    _add_bias(flat, vocab, rows, touched)
    banned = [i * vocab + token for i in touched for token in _banned(rows[i]) if 0 <= token < vocab]
    if banned:
        flat[torch.tensor(banned, device=flat.device)] = -torch.inf
    _penalise_repetition(flat, vocab, rows, [i for i in touched if rows[i].params.repetition_penalty != 1.0])
    counted = [i for i in touched if rows[i].params.frequency_penalty or rows[i].params.presence_penalty]
    _penalise_output(flat, vocab, rows, counted)
    return scores


def _add_bias(flat: torch.Tensor, vocab: int, rows: Sequence["SamplingRow"], touched: list[int]) -> None:
    places, values = [], []
    for i in touched:
        for token, value in (rows[i].params.logit_bias or {}).items():
            if token < vocab:
                places.append(i * vocab + token)
                values.append(value)
    if places:
        at = torch.tensor(places, device=flat.device)
        flat[at] += torch.tensor(values, dtype=flat.dtype, device=flat.device)


def _banned(row: "SamplingRow") -> Iterable[int]:
    """Tokens that may not be drawn now: ends before min_tokens, and the last token of each bad word begun.

    As transformers' NoBadWordsLogitsProcessor: a bad word that is one end-of-sequence token is not banned,
    and one whose beginning is longer than the sequence is not matched.
    """
    if len(row.output_ids) < row.params.min_tokens:
        yield from row.eos_ids
        yield from row.params.stop_token_ids
    if not row.bad_word_ids:
        return
    longest = max(len(word) for word in row.bad_word_ids) - 1
    tail = list(row.output_ids[-longest:]) if longest else []
    missing = longest - len(tail)
    if missing:
        tail = [*row.prompt_ids[-missing:], *tail]
    for word in row.bad_word_ids:
        begun = len(word) - 1
        if begun == 0 and word[0] in row.eos_ids:
            continue
        if begun == 0 or (begun <= len(tail) and tuple(tail[-begun:]) == tuple(word[:-1])):
            yield word[-1]


def _places(
    sequences: list[tuple[int, Sequence[int]]], vocab: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, ids) pairs as places in the flat scores, and the pair each comes from: int64 [n], int64 [n]."""
    ids = token_tensor((ids for _, ids in sequences), device)
    lengths = torch.tensor([len(ids) for _, ids in sequences], device=device)
    which = torch.repeat_interleave(torch.arange(len(sequences), device=device), lengths)
    starts = torch.tensor([row * vocab for row, _ in sequences], device=device)
    inside = (ids >= 0) & (ids < vocab)
    which = which[inside]
    return starts[which] + ids[inside], which


def _penalise_repetition(flat: torch.Tensor, vocab: int, rows: Sequence["SamplingRow"], which: list[int]) -> None:
    """Divide positive scores of seen tokens by the penalty, multiply negative ones."""
    sequences = [(i, ids) for i in which for ids in (rows[i].prompt_ids, rows[i].output_ids) if len(ids)]
    if not sequences:
        return
    places, pair = _places(sequences, vocab, flat.device)
    penalties = [rows[i].params.repetition_penalty for i, _ in sequences]
    penalty = torch.tensor(penalties, dtype=flat.dtype, device=flat.device)[pair]
    seen = flat[places]
    flat[places] = torch.where(seen < 0, seen * penalty, seen / penalty)  # a token seen twice is written twice, alike


def _penalise_output(flat: torch.Tensor, vocab: int, rows: Sequence["SamplingRow"], which: list[int]) -> None:
    """Subtract frequency_penalty times a token's count in the output, and presence_penalty once."""
    sequences = [(i, rows[i].output_ids) for i in which if len(rows[i].output_ids)]
    if not sequences:
        return
    places, _ = _places(sequences, vocab, flat.device)
    places, counts = places.unique(return_counts=True)
    pair = torch.bucketize(places // vocab, torch.tensor([i for i, _ in sequences], device=flat.device))
    penalties = [[rows[i].params.frequency_penalty, rows[i].params.presence_penalty] for i, _ in sequences]
    frequency, presence = torch.tensor(penalties, dtype=flat.dtype, device=flat.device).t()
    flat[places] = flat[places] - frequency[pair] * counts - presence[pair]
