"""One batch of `generate` on an engine: rows queued, stepped to their end, and laid out as `generate` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_paged.integrations.engine import Engine
from hf_paged.integrations.processors import Criteria, RowPrompt, native_params, pipelines, without_pads
from hf_paged.integrations.streaming import ColumnStream
from hf_paged.kernels.fp8 import selected
from hf_paged.params import SamplingParams
from hf_paged.request import Request, Row, RowHooks
from hf_paged.seeds import mix_seed
from hf_paged.speculation.speculator import Speculator


@dataclass(eq=False)
class Call:
    """One batch on an engine: queue its rows, step until all have ended, and lay the result out as `generate` does.

    `run` does all of it. Who steps many calls together calls `queue`, then, once `ended`, `result`, and `end` always.

    Attributes:
        base, first: rows draw with `mix_seed(base, first)`, `mix_seed(base, first + 1)`, ...; base is drawn where none
            is given. extra: further arguments of the rows' `SamplingParams`.
    """

    engine: Engine
    model_config: Any
    input_ids: torch.Tensor
    prompts: list[RowPrompt]
    processors: Any
    criteria: Criteria
    config: Any
    streamer: Any
    sharing: dict[str, Any] = field(default_factory=dict)
    speculator: Speculator | None = None
    base: int | None = None
    first: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    kv: dict[Row, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    lockstep: Lockstep | None = None

    def run(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The whole call."""
        try:
            self.queue()
            self._finish()
            return self.result()
        finally:
            self.end()

    def queue(self) -> None:
        """Queue the rows on the engine.

        Raises:
            ValueError: they cannot be served.
        """
        wants = self.config.return_dict_in_generate
        self.keep_logits = bool(wants and self.config.output_logits)
        self.keep_scores = bool(wants and self.config.output_scores)
        # Rows that have ended go on in `generate`, with pads for tokens: who looks at scores sees them, and without an
        # end-of-sequence token nothing replaces what such a row samples.
        many = len(self.prompts) > 1
        odd_stop = bool(self.criteria.others) and not self.criteria.eos_ids
        self.lockstep = Lockstep(self) if many and (self.keep_logits or self.keep_scores or odd_stop) else None
        with self.engine.lock:
            self.engine.begin()
            self._submit()

    @property
    def requests(self) -> list[Request]:
        """Its requests, in order."""
        return list(dict.fromkeys(row.request for row in self.rows))

    @property
    def ended(self) -> bool:
        """Whether all rows have ended, one way or another."""
        return all(row.request.ended for row in self.rows)

    def _finish(self) -> None:
        """Step until all rows have ended."""
        requests = self.requests
        stream = ColumnStream(self.streamer, self.pad) if self.streamer is not None else None
        while not all(request.ended for request in requests):
            self.engine.advance(requests)
            self._raise()
            if stream is not None:
                stream.update(self.rows, self.width)
        if stream is not None:
            stream.end()

    def _raise(self) -> None:
        for row in self.rows:
            if row.request.error is not None:
                raise row.request.error

    def end(self) -> None:
        """Leave nothing in the engine, whatever happened and wherever, and nothing that holds itself alive."""
        for name in self.names:
            self.engine.cancel(name)
        self.rows.clear()
        self.kv.clear()
        if self.lockstep is not None:
            self.lockstep.ends.clear()

    @property
    def pad(self) -> int:
        """What stands behind the end of a row."""
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    @property
    def width(self) -> int:
        """New tokens of the longest row."""
        return self.lockstep.width if self.lockstep else max(len(row.output_ids) for row in self.rows)

    def _submit(self) -> None:
        params, rest = native_params(without_pads(self.processors, self.prompts), self.keep_scores)
        if not self.config.do_sample:
            params["temperature"] = 0.0
        each = max(1, self.config.num_return_sequences or 1) if self.config.do_sample else 1
        budget = self.criteria.max_length - self.input_ids.shape[1]
        # An id that is no token ends nothing.
        ends = () if self.lockstep else [i for i in self.criteria.eos_ids if 0 <= i < self.engine.facts.vocab_size]
        params = SamplingParams(
            n=each, max_tokens=budget, ignore_eos=True, stop_token_ids=ends, **self.sharing, **self.extra, **params
        )
        base = self._base()
        hooks = [self._hooks(p, prompt) for p, prompt in zip(pipelines(rest, self.prompts), self.prompts, strict=True)]
        for first in range(0, len(self.prompts), each):
            # Names of our own, known before: an interrupt at any place leaves nothing that cannot be found again.
            self.names.append(f"generate-{id(self):x}-{first}")
            core = self.engine.core
            request = core.submit(
                self.prompts[first].ids,
                params,
                seed=self._seed(base, first // each, core.submitted),
                request_id=self.names[-1],
                hooks=hooks[first : first + each],
                speculator=self.speculator,
            )
            self.rows += request.rows

    def _base(self) -> int:
        """The seed from which those of rows derive."""
        draws = self.config.do_sample and self.engine.config.seed is None
        return self.base if self.base is not None else self.engine.draw_seed() if draws else 0

    def _seed(self, base: int, index: int, submitted: int) -> int:
        own = self.engine.config.seed
        return mix_seed(base, self.first + index) if own is None else mix_seed(own, submitted)

    def _hooks(self, pipeline: Any, prompt: RowPrompt) -> RowHooks:
        stop: Callable[[Row], Any] | None = self.criteria.stop(self.input_ids[prompt.index, : prompt.pads])
        replace = None
        if self.lockstep is not None:
            stop, replace = self.lockstep.wrap(stop), self.lockstep.replace
        closing = self._keep_kv if self.config.return_dict_in_generate else None
        return RowHooks(pipeline, stop, replace, closing, self.keep_logits, self.keep_scores)

    def _keep_kv(self, row: Row) -> None:
        """Copy a row's keys and values, `[kv_heads, tokens, dim]` a layer, before its pages go."""
        store, dtype, sequence = self.engine.store, self.engine.facts.dtype, row.sequence
        pages = torch.tensor(sequence.pages, device=self.engine.facts.device)
        self.kv[row] = [
            tuple(selected(t, pages).transpose(0, 1).flatten(1, 2)[:, : sequence.computed].to(dtype) for t in layer)
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

    def result(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns, once all rows have ended; raises the error of one that failed."""
        self._raise()
        outputs = [row.output_ids for row in self.rows]
        width = self.width
        outputs = [ids[:width] + [self.pad] * (width - len(ids)) for ids in outputs]
        new = torch.tensor(outputs, device=self.input_ids.device)
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
