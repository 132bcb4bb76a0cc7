"""`pipeline("text-generation")(rows, cache_implementation="paged")`: all rows of a call in one continuous batch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers.pipelines.pt_utils import PipelineIterator
from transformers.pipelines.text_generation import ReturnType, TextGenerationPipeline

from hf_paged.integrations.call import Call
from hf_paged.integrations.compat import pipeline_arguments, pipeline_own_arguments
from hf_paged.seeds import draw_seed

logger = logging.getLogger("hf_paged")
# Arguments that see a whole static batch, or that may keep something from one call of `generate` to the next.
OF_A_BATCH = ("streamer", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn", "prefix_length")
# Results that wait for an earlier row, to each row that may be in flight.
BUFFERED = 8


def wrap_iterator(original: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """`TextGenerationPipeline.get_iterator`, which answers lists, datasets and generators, for `enable`.

    Each row goes through the pipeline's own `preprocess`, `_forward` and `postprocess`; only where `_forward` has
    called `generate`, and `generate` has prepared its batch of one, the row joins those that the engine computes.
    """

    def get_iterator(
        self: TextGenerationPipeline, inputs: Any, num_workers: int, batch_size: int, *params: dict[str, Any]
    ) -> PipelineIterator:
        preprocess, forward, postprocess = params
        prepared = _prepared(self, forward, settings, lambda of: batch_size > 1 and _shows_pads(self, postprocess, of))
        if prepared is None:
            return original(self, inputs, num_workers, batch_size, *params)
        # Rows one by one: whatever else the pipeline does around its model stays as it is.
        plain = original(self, inputs, num_workers, 1, preprocess, forward, postprocess)
        arguments, window, samples = prepared
        rows = Rows(self, plain.loader.loader, arguments, window, samples, lasting=not isinstance(inputs, list))
        return Results(rows, self.postprocess, postprocess)

    return get_iterator


def _prepared(
    pipe: TextGenerationPipeline, forward: dict[str, Any], settings: dict[str, Any], padded: Callable[[Any], bool]
) -> tuple[dict[str, Any], int, bool] | None:
    """Arguments for `_forward`, rows in flight, and whether rows are sampled; None: the pipeline's ordinary way.

    Args:
        padded: whether a caller sees the pads of batches, with these settings.
    """
    from hf_paged.integrations.doors import PagedCall, setting

    arguments = pipeline_arguments(pipe, forward)
    if setting("cache_implementation", arguments, arguments.get("generation_config"), pipe.model) != "paged":
        return None
    config = arguments.pop("generation_config", None)
    call = PagedCall(type(pipe.model).generate, pipe.model, settings, config, arguments)
    effective = call.effective()
    reason = call.why_not(effective) or _why_not(pipe, arguments, effective)
    if reason is None and padded(effective):
        reason = "the result shows how batches are padded (with batch_size=1 it does not)"
    if reason is not None:
        logger.info("rows of the pipeline go batch by batch: %s", reason)
        return None
    arguments = call.for_engine(effective, Awaited)
    if call.generation_config is not None:
        arguments["generation_config"] = call.generation_config
    # `_forward` adds what `pipeline(...)` was given: here that is seen to.
    own = pipeline_own_arguments(pipe)
    arguments |= {name: None for name in ("cache_implementation", "cache_config") if name in own}
    return arguments, call.config.max_sequences, bool(effective.do_sample)


def _why_not(pipe: TextGenerationPipeline, arguments: dict[str, Any], effective: Any) -> str | None:
    """Why rows must go one static batch after another; None where they may not."""
    if type(pipe)._forward is not TextGenerationPipeline._forward:
        return f"{type(pipe).__name__} has a _forward of its own"
    for name in OF_A_BATCH:
        if arguments.get(name) is not None:
            return f"{name} is given"
    if effective.max_time is not None:
        return "max_time is given"
    return "return_dict_in_generate is given" if effective.return_dict_in_generate else None


def _shows_pads(pipe: TextGenerationPipeline, postprocess: dict[str, Any], effective: Any) -> bool:
    """Whether pads of a batch would be in the result, or count towards a total length."""
    if postprocess.get("return_type") is ReturnType.TENSORS or postprocess.get("skip_special_tokens") is False:
        return True
    if getattr(pipe.tokenizer, "response_template", None):  # special tokens are kept for it
        return True
    if effective.stop_strings and effective.eos_token_id is None:  # rows of a batch go on behind theirs
        return True
    return effective.max_new_tokens is None or bool(effective.min_length)


class Awaited:
    """Stands for the ids that `generate` will have returned: `_forward` asks for their shape, and reshapes them."""

    def __init__(self, call: Call) -> None:
        self.call, self.shape = call, (1, 0)

    def reshape(self, *shape: int) -> Awaited:
        return self


@dataclass(eq=False)
class Rows:
    """Outputs of `_forward` for all rows, in order, as a pipeline's iterator takes them.

    Attributes:
        inputs: preprocessed rows; iterated anew each time that this is.
        arguments: of `_forward`.
        window: rows that may be in flight. More are read as these end.
        samples: whether a seed is drawn.
        lasting: whether the caller can go on behind a row that failed.
    """

    pipe: TextGenerationPipeline
    inputs: Iterable[Any]
    arguments: dict[str, Any]
    window: int
    samples: bool
    lasting: bool

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Run:
        seed = draw_seed() if self.samples else 0  # before a data loader draws one of its own
        return Run(self, iter(self.inputs), seed)


@dataclass(eq=False)
class Run:
    """One pass over the rows. `close` takes what is in flight off the engine.

    Attributes:
        seed: from which that of each row derives, by its place: batches and windows change nothing.
        queued: what was made of rows that were not given out yet: an output of `_forward`, or why there is none.
    """

    rows: Rows
    inputs: Iterator[Any]
    seed: int
    count: int = 0
    over: bool = False
    queued: deque[dict[str, Any] | Exception] = field(default_factory=deque)

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            output = self._next()
        except Exception:
            if not self.rows.lasting:
                self.close()
            raise
        except BaseException:
            self.close()
            raise
        return output

    def _next(self) -> dict[str, Any]:
        self._fill()
        if not self.queued:
            raise StopIteration
        call = _call_of(self.queued[0])
        try:
            while call is not None and not call.ended:
                call.engine.advance(call.requests)
                self._fill()
            return self._output(self.queued[0], call)
        finally:
            if call is not None:
                call.end()
            if self.queued:
                self.queued.popleft()

    def _output(self, entry: dict[str, Any] | Exception, call: Call | None) -> dict[str, Any]:
        if isinstance(entry, Exception):
            raise entry
        if call is None:  # transformers' own loop has run it
            return entry
        ids = call.result()
        return entry | {"generated_sequence": ids.reshape(1, *ids.shape).to("cpu")}

    def _fill(self) -> None:
        """Read rows until as many are in flight as may be."""
        most = self.rows.window
        while not self.over and len(self.queued) < BUFFERED * most and self._in_flight() < most:
            try:
                inputs = next(self.inputs)
            except StopIteration:
                self.over = True
                return
            except Exception as error:  # told when its turn comes
                self.queued.append(error)
                if not self.rows.lasting:
                    self.over = True
                return
            self._start(inputs)
            if _call_of(self.queued[-1]) is None:  # computed already, or refused: no reason to read ahead
                return

    def _start(self, inputs: dict[str, Any]) -> None:
        call = None
        try:
            output = self.rows.pipe.forward(inputs, **self.rows.arguments)
            call = _call_of(output)
            if call is not None:
                call.base, call.first = self.seed, self.count
                self.queued.append(output)
                call.queue()
        except Exception as error:
            if call is not None:
                self.queued.pop()
            self.queued.append(error)
        else:
            if call is None:
                self.queued.append(output)
        self.count += 1

    def _in_flight(self) -> int:
        return sum(1 for entry in self.queued if (call := _call_of(entry)) is not None and not call.ended)

    def close(self) -> None:
        """Read no more, and take what is in flight off the engine."""
        self.over = True
        while self.queued:
            call = _call_of(self.queued[-1])
            if call is not None:
                call.end()
            self.queued.pop()

    def __del__(self) -> None:
        calls = [call for entry in self.queued if (call := _call_of(entry)) is not None]
        if any(call.engine.stepping for call in calls):  # collected inside a step, which cancels nothing
            threading.Thread(target=self.close, daemon=True).start()
        else:
            self.close()


def _call_of(entry: Any) -> Call | None:
    """The call of an output of `_forward` that is still to come."""
    ids = entry.get("generated_sequence") if isinstance(entry, dict) else None
    return ids.call if isinstance(ids, Awaited) else None


class Results(PipelineIterator):
    """What a pipeline returns for datasets and generators. `close` takes what is in flight off the engine."""

    def __iter__(self) -> Results:
        self.close()
        return super().__iter__()

    def __next__(self) -> list[dict[str, Any]]:
        if not hasattr(self, "iterator"):
            iter(self)
        return super().__next__()

    def close(self) -> None:
        """Cancel rows that are in flight; nothing more is given."""
        if hasattr(self, "iterator"):
            self.iterator.close()
