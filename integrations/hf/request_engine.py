"""Requests on a model's engine: prompts become requests, which are stepped, answered and cancelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_paged.integrations.model_engine import ModelEngine
from hf_paged.integrations.prompts import Prompt, refused
from hf_paged.outcomes import StepResult
from hf_paged.outputs import RequestOutput
from hf_paged.params import SamplingParams
from hf_paged.request import Request, Row
from hf_paged.seeds import mix_seed


class RequestEngine(ModelEngine):
    """Takes prompts, one by one for whoever owns the loop, or many to their end. `made`: as for `ModelEngine`."""

    def __init__(self, *made: Any) -> None:
        self._submitted: set[Request] = set()
        self._finished: list[RequestOutput] = []
        super().__init__(*made)

    def submit(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queue a prompt for `step`.

        Returns:
            the request's id.
        Raises:
            ValueError: it cannot be served; the message says why.
        """
        with self.lock:
            request = self._submit_one(prompt, sampling_params, request_id)
            self._submitted.add(request)
            return request.request_id

    def step(self) -> list[RequestOutput]:
        """Compute one batch; results of submitted requests that have ended since the last call."""
        with self.lock:
            if self.core.has_work:
                self._step()
            finished, self._finished = self._finished, []
            return finished

    def cancel(self, request_id: str) -> bool:
        """End a request now. False: there is none of this id under way."""
        with self.lock:
            return self.core.cancel(request_id)

    def drop(self, requests: list[Request]) -> None:
        """Cancel those that have not ended."""
        with self.lock:
            for request in requests:
                if not request.ended:
                    self.core.cancel(request.request_id)

    def advance(self, requests: list[Request]) -> None:
        """Compute one batch, unless another thread has just brought all of `requests` to their end."""
        with self.lock:
            if not all(request.ended for request in requests):
                self._step()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to give."""
        return self.core.busy or bool(self._finished) or any(request.ended for request in self._submitted)

    # -- inside

    def _draws(self, params: SamplingParams) -> bool:
        """Whether such a request needs a seed from torch's generator."""
        return params.seed is None and self.config.seed is None and not params.greedy

    def _submit_one(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None = None) -> Request:
        self.begin()
        params = params or SamplingParams()
        return self._submit(prompt, params, self.draw_seed() if self._draws(params) else 0, 0, request_id)

    def _submit(
        self, prompt: Prompt, params: SamplingParams, base: int, index: int, request_id: str | None = None
    ) -> Request:
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            if self.tokenizer is None:
                raise ValueError("a prompt given as text needs a tokenizer: give the engine one, or token ids")
            prompt = self.tokenizer(text)["input_ids"]
        if params.seed is not None:
            seed = params.seed
        elif self.config.seed is not None:
            seed = mix_seed(self.config.seed, self.core.submitted)
        else:
            seed = mix_seed(base, index)
        return self.core.submit(
            prompt, params, seed=seed, prompt=text, request_id=request_id, speculator=self.speculator
        )

    def _run(self, prompts: list[Prompt], params: Any) -> Iterator[tuple[int, RequestOutput]]:
        """Queue all, step until all have ended; yields index and result in order of their end."""
        params = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        params = [param or SamplingParams() for param in params]
        if len(params) != len(prompts):
            raise ValueError(
                f"sampling_params has {len(params)} entries for {len(prompts)} prompts: give one, or as many"
            )
        pending: dict[Request, int] = {}
        ended: list[Request] = []
        failed = []
        try:
            with self.lock:
                self.begin()
                base = self.draw_seed() if any(self._draws(p) for p in params) else 0
                for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                    try:
                        request = self._submit(prompt, param, base, index)
                        request.on_end = ended.append
                        pending[request] = index
                    except ValueError as error:
                        failed.append((index, refused(prompt, index, error)))
                self.core.arrange(list(pending))
            yield from failed
            while pending:
                with self.lock:
                    if not ended:
                        self._step()
                    outputs = [(pending.pop(request), request.output(self._text)) for request in ended]
                    ended.clear()
                yield from outputs
        finally:
            self.drop(list(pending))

    def _step(self) -> StepResult:
        result = super()._step()
        for request in result.finished:
            if request in self._submitted:
                self._submitted.discard(request)
                self._finished.append(request.output(self._text))
        return result

    def _text(self, row: Row) -> str:
        if self.tokenizer is None:
            return ""
        text = self._decode(row.output_ids)
        return text if row.text_length is None else row.text.text[: row.text_length]
