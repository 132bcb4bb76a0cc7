"""A request of a manager: what was asked for, the rows that answer it, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from hf_paged.integrations.call import Call
from hf_paged.request import Row


def checked_ids(input_ids: Any) -> list[int]:
    """A prompt as a list of ints.

    Raises:
        ValueError: it is something else.
    """
    ids = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if isinstance(ids, str) or not isinstance(ids, Sequence) or not all(isinstance(i, Integral) for i in ids):
        raise ValueError(f"input_ids={_short(input_ids)} is not allowed: a list of token ids")
    return [int(i) for i in ids]


OWN_SAMPLING = {"temperature": Real, "top_k": Integral, "top_p": Real}


def checked_sampling(given: dict[str, Any], allowed: bool) -> None:
    """Look at the sampling settings of one request.

    Raises:
        ValueError: one is unknown, of another type, or none are allowed.
    """
    for name, value in given.items():
        kind = OWN_SAMPLING.get(name)
        if kind is None:
            raise ValueError(f"{name}={value!r} is not allowed: a request may have its own {', '.join(OWN_SAMPLING)}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not allowed: a number{' without a fraction' * (kind is Integral)}")
        if not allowed:
            raise ValueError(f"{name}={value!r} is not allowed: the manager needs per_request_processors=True")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class RowState:
    """A row as far as it was told: its tokens, when each came, and whether its end was."""

    request_id: str
    told: int = 0
    timestamps: list[float] = field(default_factory=list)
    over: bool = False


@dataclass(eq=False)
class Job:
    """A request from `add_request` on.

    Attributes:
        index: its place among all of the manager's; its seed derives from it.
        sampling: temperature, top_k and top_p of its own.
        call: its rows on the engine, once they are there.
        rows: one for each of `sequences`, in the order of `generate`; the last has the request's own id.
    """

    request_id: str
    prompt_ids: list[int]
    index: int
    sequences: int = 1
    max_new_tokens: int | None = None
    streaming: bool = False
    record_timestamps: bool = False
    eos_token_id: tuple[int, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    created_time: float = field(default_factory=time.perf_counter)
    call: Call | None = None
    rows: list[RowState] = field(default_factory=list)

    def __post_init__(self) -> None:
        children = [f"{self.request_id}__child#{i}" for i in range(self.sequences - 1)]
        self.rows = [RowState(name) for name in (*children, self.request_id)]

    @property
    def over(self) -> bool:
        """Whether the ends of all rows were told."""
        return all(state.over for state in self.rows)

    def news(self) -> list[GenerationOutput]:
        """What is to be told since the last time: ends of rows, and new tokens where they are streamed."""
        outputs, now = [], time.perf_counter()
        for state, row in zip(self.rows, self.call.rows, strict=True):
            if state.over:
                continue
            told, state.told = state.told, len(row.output_ids)
            over = row.finish_reason is not None or row.request.ended
            if self.streaming:  # as transformers does, one for each token, however many a step gave
                for count in range(told + 1, state.told + (not over)):
                    self._time(state, now, 1)
                    outputs.append(self._output(state, row, count))
            self._time(state, now, state.told - len(state.timestamps))
            # A row that has its last token is told even while its siblings go on.
            state.over = over
            if over:
                outputs.append(self._output(state, row, state.told))
        return outputs

    def _time(self, state: RowState, now: float, tokens: int) -> None:
        if self.record_timestamps:
            state.timestamps += [now] * tokens

    def _output(self, state: RowState, row: Row, count: int) -> GenerationOutput:
        """What is told of a row and its first `count` tokens."""
        error = row.request.error
        if error is None and row.finish_reason == "cancelled":
            error = "the request was cancelled"
        status = RequestStatus.DECODING
        if state.over:
            status = RequestStatus.FINISHED if error is None else RequestStatus.FAILED
        metrics, scored = row.request.metrics, zip(row.logprobs, row.output_ids[:count], strict=False)
        began = metrics.first_scheduled_time or metrics.arrival_time
        return self.output(
            state,
            row.output_ids[:count],
            status,
            None if error is None else str(error),
            lifespan=(began, time.perf_counter() if state.over else -1),
            logprobs=[entry[token].processed for entry, token in scored],
        )

    def output(
        self, state: RowState, tokens: list[int], status: RequestStatus, error: str | None = None, **more: Any
    ) -> GenerationOutput:
        """What transformers' manager would give of a row."""
        return GenerationOutput(
            request_id=state.request_id,
            prompt_ids=list(self.prompt_ids),
            generated_tokens=tokens,
            error=error,
            status=status,
            created_time=self.created_time,
            timestamps=list(state.timestamps) if self.record_timestamps else None,
            **more,
        )

    def fail(self, error: BaseException | str) -> list[GenerationOutput]:
        """The ends of all rows that have none yet: what they have, and why they go no further."""
        outputs = []
        for at, state in enumerate(self.rows):
            if not state.over:
                tokens = list(self.call.rows[at].output_ids) if self.call is not None and self.call.rows else []
                outputs.append(self.output(state, tokens, RequestStatus.FAILED, str(error) or type(error).__name__))
                state.over = True
        return outputs

    def answered(self, ids: torch.Tensor, eos_ids: Sequence[int]) -> list[GenerationOutput]:
        """The ends of its rows where `generate` has returned `ids` `[rows, length]`, with pads behind an end."""
        outputs = []
        for state, row in zip(self.rows, ids[:, len(self.prompt_ids) :].tolist(), strict=True):
            ends = [at for at, token in enumerate(row) if token in eos_ids]
            tokens, state.over = row[: ends[0] + 1] if ends else row, True
            outputs.append(self.output(state, tokens, RequestStatus.FINISHED))
        return outputs
