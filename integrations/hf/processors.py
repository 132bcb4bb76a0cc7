"""transformers' logits processors and stopping criteria, as the engine takes them: row by row, or once for all rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation import logits_process as lp
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from hf_paged.request import Row
from hf_paged.sampling import Pipeline

# They ignore the ids and treat each row alike: one call serves the batch.
BATCHED = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.LogitNormalization,
    lp.SuppressTokensLogitsProcessor,
)
# They work on the whole batch, keep a state of it, or take logits that the engine refuses: transformers' own loop runs
# them.
LOOP_ONLY = (
    lp.InfNanRemoveLogitsProcessor,
    lp.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    lp.ClassifierFreeGuidanceLogitsProcessor,
    lp.WatermarkLogitsProcessor,
    lp.SynthIDTextWatermarkLogitsProcessor,
)
# What depends on the length of the padded prompt, by the attribute that holds a length.
LENGTHS = {
    lp.MinLengthLogitsProcessor: "min_length",
    lp.MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    lp.ForcedEOSTokenLogitsProcessor: "max_length",
    lp.ExponentialDecayLengthPenalty: "regulation_start",
    lp.SuppressTokensAtBeginLogitsProcessor: "begin_index",
}
PER_ROW = (
    lp.EncoderRepetitionPenaltyLogitsProcessor,
    lp.EncoderNoRepeatNGramLogitsProcessor,
    lp.PrefixConstrainedLogitsProcessor,
)


@dataclass(frozen=True)
class RowPrompt:
    """A row of the batch: its index, its own prompt ids, and the pads before them."""

    index: int
    ids: list[int]
    pads: int


def without_pads(processors: Sequence[Any], rows: Sequence[RowPrompt]) -> list[Any]:
    """The processors for rows that hold no pads: a repetition penalty that passes the batch's pads over need not."""
    made = []
    for processor in processors or ():
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, torch.Tensor) and ignored.tolist() == [row.pads for row in rows]:
            processor = copy.copy(processor)
            processor.prompt_ignore_length = None
        made.append(processor)
    return made


def native_params(processors: Sequence[Any], keep_scores: bool) -> tuple[dict[str, float], list[Any]]:
    """Split off what the engine does itself, and much faster: a repetition penalty that comes first and temperature,
    top-k, top-p and min-p that come last, in this order.

    Args:
        processors: in the order in which `generate` applies them.
        keep_scores: processed scores are asked for; they come from the processors themselves then.

    Returns:
        arguments of `SamplingParams`, and the processors that are left.
    """
    rest, params = list(processors), {}
    if keep_scores:
        return params, rest
    tail = (
        (lp.MinPLogitsWarper, "min_p", "min_p"),
        (lp.TopPLogitsWarper, "top_p", "top_p"),
        (lp.TopKLogitsWarper, "top_k", "top_k"),
        (lp.TemperatureLogitsWarper, "temperature", "temperature"),
    )
    for kind, attribute, name in tail:
        if rest and type(rest[-1]) is kind and _is_default(rest[-1]):
            params[name] = getattr(rest.pop(), attribute)
    if len(rest) == 1 and type(rest[0]) is lp.RepetitionPenaltyLogitsProcessor and rest[0].prompt_ignore_length is None:
        params["repetition_penalty"] = rest.pop().penalty
    return params, rest


def _is_default(warper: Any) -> bool:
    ordinary = getattr(warper, "filter_value", -float("inf")) == -float("inf")
    ordinary = ordinary and getattr(warper, "top_p", 1.0) > 0  # 0 keeps one token; `SamplingParams` does not take it
    return ordinary and getattr(warper, "min_tokens_to_keep", 1) == 1


def pipelines(processors: Sequence[Any], rows: Sequence[RowPrompt]) -> list[Pipeline | None]:
    """One pipeline a row; rows for which nothing differs share it, so that batched steps serve them together."""
    if not processors:
        return [None] * len(rows)
    shared = _pipeline(processors)
    if any(isinstance(p, PER_ROW) for p in processors):
        return [_own(processors, row) for row in rows]
    if any(type(p) in LENGTHS for p in processors):
        return [_own(processors, row) if row.pads else shared for row in rows]
    return [shared] * len(rows)


def _own(processors: Sequence[Any], row: RowPrompt) -> Pipeline:
    return _pipeline([_for_row(p, row) for p in processors])


def _pipeline(processors: Sequence[Any]) -> Pipeline:
    """transformers' own processors may be asked about drafts too: they keep no state."""
    steps = tuple((p, isinstance(p, BATCHED)) for p in processors)
    return Pipeline(steps, tuple(step for step in steps if type(step[0]).__module__ == lp.__name__))


def _for_row(processor: Any, row: RowPrompt) -> Any:
    """The processor as it would be for this row alone: lengths without its pads, its own prompt, its own index."""
    attribute = LENGTHS.get(type(processor))
    if attribute is not None:
        processor = copy.copy(processor)
        setattr(processor, attribute, getattr(processor, attribute) - row.pads)
    elif isinstance(processor, lp.EncoderRepetitionPenaltyLogitsProcessor):
        processor = copy.copy(processor)
        processor.encoder_input_ids = torch.tensor([row.ids])
    elif isinstance(processor, lp.EncoderNoRepeatNGramLogitsProcessor):
        processor = lp.EncoderNoRepeatNGramLogitsProcessor(processor.ngram_size, torch.tensor([row.ids]))
    elif isinstance(processor, lp.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = lp.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row.index, ids), 1)
    return processor


@dataclass(frozen=True)
class Criteria:
    """What ends a row of `generate`.

    Attributes:
        max_length: of the padded row, or None.
        eos_ids: ids that end it.
        others: criteria that are called with the row's ids.
    """

    max_length: int | None
    eos_ids: tuple[int, ...]
    others: tuple[StoppingCriteria, ...]

    @classmethod
    def of(cls, criteria: Sequence[StoppingCriteria]) -> Criteria:
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        eos = [int(i) for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.flatten()]
        others = tuple(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))
        return cls(min(lengths, default=None), tuple(dict.fromkeys(eos)), others)

    def stop(self, pads: torch.Tensor) -> Callable[[Row], bool | None] | None:
        """A hook for a row, or None where there is nothing to ask.

        Criteria see the row as it stands in the batch, with its `pads` (int64 `[n]`) before it: lengths then mean what
        they mean in `generate`. They get scores where these are kept.
        """
        if not self.others:
            return None

        def stop(row: Row) -> bool | None:
            ids = torch.cat((pads, torch.tensor(row.tokens, device=pads.device)))[None]
            scores = tuple(kept[None] for kept in row.scores) if row.hooks.keep_scores else None
            met = [bool(torch.as_tensor(criterion(ids, scores)).any()) for criterion in self.others]
            return True if any(met) else None

        return stop
