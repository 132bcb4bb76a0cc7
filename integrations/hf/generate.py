"""One call of `generate`, after transformers has prepared it, on the model's engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_paged.config import EngineConfig
from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.engine import Engine
from hf_paged.integrations.fallback import transformers_sample
from hf_paged.integrations.processors import WHOLE_BATCH, Criteria, RowPrompt, native_params, pipelines, without_pads
from hf_paged.integrations.registry import REGISTRY
from hf_paged.integrations.streaming import ColumnStream
from hf_paged.params import SamplingParams
from hf_paged.request import Request, Row, RowHooks
from hf_paged.seeds import draw_seed, mix_seed

# What `generate` hands to a decoding method for every model, and the engine sees to itself.
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    draft_model: Any = None,
    engine_config: EngineConfig | dict[str, Any] | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """A strategy for `model.generate(..., custom_generate=hf_paged.generate)`; nothing is patched.

    Args:
        draft_model: not available yet: only None is taken.
        engine_config: an `EngineConfig`, or a dict of its fields.

    Returns:
        what `generate` returns: `[batch, length]` ids, or a dict-like output.
    """
    if draft_model is not None:
        raise ValueError(f"draft_model={type(draft_model).__name__}: speculation is not available yet, leave it out")
    config = (
        engine_config if isinstance(engine_config, EngineConfig) else EngineConfig.from_dict(dict(engine_config or {}))
    )
    return run_prepared(
        model, input_ids, logits_processor, stopping_criteria, generation_config, config, None, model_kwargs
    )


def run_prepared(
    model: nn.Module,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    generation_config: Any,
    config: EngineConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Greedy decoding or sampling of a prepared batch, on the engine where it can, else in transformers' loop."""
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    reason = _why_not(model, prompts, processors, criteria, generation_config, model_kwargs)
    if reason is None:
        try:
            engine = REGISTRY.engine_for(model, config)
        except CannotDrive as error:
            reason = str(error)
    if reason is not None:
        return transformers_sample(
            model, input_ids, processors, criteria, generation_config, config, streamer, model_kwargs, reason
        )
    text_config = model.config.get_text_config(decoder=True)
    call = Call(engine, text_config, input_ids, prompts, processors, Criteria.of(criteria), generation_config, streamer)
    return call.run()


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[RowPrompt] | None:
    """The rows without their left pads; None where a row has other gaps, or nothing but pads."""
    ids = input_ids.tolist()
    if mask is None:
        return [RowPrompt(i, row, 0) for i, row in enumerate(ids)]
    if mask.shape != input_ids.shape:
        return None
    mask = mask.ne(0)
    pads = (~mask).sum(-1)
    expected = torch.arange(mask.shape[1], device=mask.device) >= pads[:, None]
    if not torch.equal(mask, expected) or int(pads.max()) == mask.shape[1]:
        return None
    return [RowPrompt(i, row[p:], p) for i, (row, p) in enumerate(zip(ids, pads.tolist(), strict=True))]


def _why_not(model, prompts, processors, criteria, generation_config, model_kwargs) -> str | None:
    """Why transformers' own loop must run this call; None where the engine can."""
    if prompts is None:
        return "the attention mask has holes, right pads or empty rows"
    if not prompts or not prompts[0].ids:
        return "the prompt is empty"
    extra = sorted(k for k, v in model_kwargs.items() if k not in PREPARED and v is not None)
    if extra:
        return f"the model takes {', '.join(extra)}"
    if not model_kwargs.get("use_cache", True):
        return "use_cache is False"
    if _past_length(model_kwargs.get("past_key_values")):
        return "past_key_values hold tokens already"
    if not _usual_positions(prompts, model_kwargs.get("position_ids")):
        return "position_ids are given"
    for processor in processors or ():
        if isinstance(processor, WHOLE_BATCH):
            return f"{type(processor).__name__} works on the whole batch"
    if Criteria.of(criteria).max_length is None:
        return "there is no maximal length"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, None):
            return f"{name} is asked for"
    return None


def _past_length(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def _usual_positions(prompts: list[RowPrompt], position_ids: torch.Tensor | None) -> bool:
    """Whether each row's tokens stand at 0, 1, 2, ... (what stands at pads does not matter)."""
    if position_ids is None:
        return True
    if position_ids.dim() != 2:
        return False
    positions = position_ids.expand(len(prompts), -1).tolist()
    return all(row[p.pads :] == list(range(len(p.ids))) for p, row in zip(prompts, positions, strict=True))


@dataclass(eq=False)
class Call:
    """One batch on an engine: queue its rows, step until all have ended, and lay the result out as `generate` does."""

    engine: Engine
    model_config: Any
    input_ids: torch.Tensor
    prompts: list[RowPrompt]
    processors: Any
    criteria: Criteria
    config: Any
    streamer: Any
    rows: list[Row] = field(default_factory=list)
    kv: dict[Row, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def run(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        wants = self.config.return_dict_in_generate
        self.keep_logits = bool(wants and self.config.output_logits)
        self.keep_scores = bool(wants and self.config.output_scores)
        # Rows that have ended go on in `generate`, with pads for tokens: who looks at scores sees them, and without an
        # end-of-sequence token nothing replaces what such a row samples.
        many = len(self.prompts) > 1
        odd_stop = bool(self.criteria.others) and not self.criteria.eos_ids
        self.lockstep = Lockstep(self) if many and (self.keep_logits or self.keep_scores or odd_stop) else None
        requests: list[Request] = []
        stream = ColumnStream(self.streamer, self.pad) if self.streamer is not None else None
        try:
            with self.engine.lock:
                self.engine.begin()
                requests += self._submit()
            while not all(request.ended for request in requests):
                self.engine.advance(requests)
                for request in requests:
                    if request.error is not None:
                        raise request.error
                if stream is not None:
                    stream.update(self.rows)
            if stream is not None:
                stream.end(self.rows)
        finally:
            self.engine.drop(requests)
        return self._result()

    @property
    def pad(self) -> int:
        """What stands behind the end of a row."""
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def _submit(self) -> list[Request]:
        params, rest = native_params(without_pads(self.processors, self.prompts), self.keep_scores)
        if not self.config.do_sample:
            params["temperature"] = 0.0
        each = max(1, self.config.num_return_sequences or 1) if self.config.do_sample else 1
        budget = self.criteria.max_length - self.input_ids.shape[1]
        ends = () if self.lockstep else self.criteria.eos_ids
        params = SamplingParams(n=each, max_tokens=budget, ignore_eos=True, stop_token_ids=ends, **params)
        base = draw_seed() if self.config.do_sample else 0
        hooks = [self._hooks(pipeline) for pipeline in pipelines(rest, self.prompts)]
        requests = []
        for first in range(0, len(self.prompts), each):
            prompt = self.prompts[first]
            seed = mix_seed(base, first // each)
            requests.append(self.engine.core.submit(prompt.ids, params, seed=seed, hooks=hooks[first : first + each]))
            self.rows += requests[-1].rows
        return requests

    def _hooks(self, pipeline: Any) -> RowHooks:
        stop: Callable[[Row], Any] | None = self.criteria.stop(self.input_ids.device)
        replace = None
        if self.lockstep is not None:
            stop, replace = self.lockstep.wrap(stop), self.lockstep.replace
        closing = self._keep_kv if self.config.return_dict_in_generate else None
        return RowHooks(pipeline, stop, replace, closing, self.keep_logits, self.keep_scores)

    def _keep_kv(self, row: Row) -> None:
        """Copy a row's keys and values, `[kv_heads, tokens, dim]` a layer, before its pages go."""
        store, sequence = self.engine.store, row.sequence
        pages = torch.tensor(sequence.pages, device=self.engine.facts.device)
        self.kv[row] = [
            tuple(t.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, : sequence.computed] for t in layer)
            for layer in zip(store.keys, store.values, strict=True)
        ]

    def _cache(self, length: int) -> DynamicCache:
        """What `generate` returns as `past_key_values`: `length` tokens a row, zeros at pads."""
        cache = DynamicCache(config=self.model_config)
        for layer in range(len(self.engine.facts.layers)):
            pair = []
            for which in (0, 1):
                kept = [self.kv[row][layer][which] for row in self.rows]
                out = kept[0].new_zeros(len(kept), kept[0].shape[0], length, kept[0].shape[-1])
                for i, (tensor, prompt) in enumerate(zip(kept, self.prompts, strict=True)):
                    tensor = tensor[:, : length - prompt.pads]
                    out[i, :, prompt.pads : prompt.pads + tensor.shape[1]] = tensor
                pair.append(out)
            cache.update(*pair, layer)
        return cache

    def _result(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        outputs = [row.output_ids for row in self.rows]
        width = self.lockstep.width if self.lockstep else max(len(ids) for ids in outputs)
        outputs = [ids[:width] + [self.pad] * (width - len(ids)) for ids in outputs]
        new = torch.tensor(outputs, dtype=self.input_ids.dtype, device=self.input_ids.device)
        sequences = torch.cat([self.input_ids, new], dim=-1)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._columns("scores", width) if self.keep_scores else None,
            logits=self._columns("logits", width) if self.keep_logits else None,
            past_key_values=self._cache(sequences.shape[1] - 1),
        )

    def _columns(self, name: str, width: int) -> tuple[torch.Tensor, ...]:
        """Kept tensors of all rows, step by step: `width` tensors `[batch, vocab]`."""
        kept = [getattr(row, name) for row in self.rows]
        return tuple(torch.stack([row[at] for row in kept]) for at in range(width))


class Lockstep:
    """Lets rows that have ended go on until all have, as they do in `generate`."""

    def __init__(self, call: Call) -> None:
        self.call, self.ends = call, {}

    @property
    def width(self) -> int:
        """New tokens of the longest row."""
        return max(self.ends.get(row, len(row.output_ids)) for row in self.call.rows)

    def replace(self, row: Row, token: int) -> int:
        """The token that follows: a pad where the row has ended (and there is an end-of-sequence token)."""
        return self.call.pad if row in self.ends and self.call.criteria.eos_ids else token

    def wrap(self, stop: Callable[[Row], Any] | None) -> Callable[[Row], Any]:
        """A row stops once all have ended and it has as many tokens as the longest."""

        def hook(row: Row) -> bool | None:
            length = len(row.output_ids)
            full = length >= row.request.max_tokens
            eos = row.output_ids[-1] in self.call.criteria.eos_ids
            if row not in self.ends and (full or eos or (stop is not None and stop(row))):
                self.ends[row] = length
            done = len(self.ends) == len(self.call.rows) and length >= max(self.ends.values())
            return True if done else None

        return hook
