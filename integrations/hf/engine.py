"""`Engine`: continuous batching over a transformers model, for whoever does not come through `generate`."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from hf_paged.config import EngineConfig
from hf_paged.engine import EngineCore, StepResult
from hf_paged.integrations.cuda_step import make_stepper
from hf_paged.integrations.drafters import make_drafter, speculation_settings
from hf_paged.integrations.events import EventFeed
from hf_paged.integrations.inspect import PagedForward, model_facts, verify_forward
from hf_paged.integrations.parallel import InStep, Team, refuse_files, refuse_tiers
from hf_paged.integrations.prompts import Prompt, listed, refused
from hf_paged.integrations.scoring import perplexities, score_all
from hf_paged.integrations.sizing import core_settings, kv_dtype, make_tiers, pool_pages
from hf_paged.integrations.summary import TreeSummary, summarise
from hf_paged.integrations.validity import Validity, identity
from hf_paged.integrations.vocabularies import Pair, tokenizer_pair
from hf_paged.kernels import choose_backend
from hf_paged.memory import Memory
from hf_paged.outputs import RequestOutput, Score, TokenEvent
from hf_paged.params import SamplingParams
from hf_paged.request import Request, Row
from hf_paged.saved import load_prefixes, save_prefixes
from hf_paged.seeds import draw_seed, mix_seed
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.stats import SpeculationStats
from hf_paged.stats import EngineStats
from hf_paged.store import KVStore


class Engine:
    """Runs any number of requests on one model, batched continuously over paged KV memory.

    A token depends on the model, its prompt, its parameters and its seed only. Safe to call from several threads:
    their requests share batches. `with Engine(...) as engine:` closes it.

    Args:
        model: a causal language model with attention in every layer.
        config: an `EngineConfig`, or a dict of its fields.
        tokenizer: needed for prompts given as text, for `stop` and `bad_words`, and for texts in results.
        draft_model: a causal model that drafts.
        draft_tokenizer: the draft model's, where its vocabulary is another; `tokenizer` is needed, too.
        speculation: who drafts, and how much: a `SpeculationConfig`, a dict of its fields, or the name of a method.
            Default: `draft` where a draft model is given, else nothing is drafted.
        settings: fields of `EngineConfig`, instead of `config`.

    Raises:
        ValueError: a bad setting, or a model that cannot be driven (the message says why).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: EngineConfig | dict[str, Any] | None = None,
        *,
        tokenizer: Any = None,
        draft_model: torch.nn.Module | None = None,
        draft_tokenizer: Any = None,
        speculation: SpeculationConfig | dict[str, Any] | str | None = None,
        model_ref: Callable[[], torch.nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ValueError(f"give config or {', '.join(settings)}, not both")
        if not isinstance(config, EngineConfig):
            config = EngineConfig.from_dict(dict(config or settings))
        self.config, self.tokenizer = config, tokenizer
        self._model = model_ref or (lambda: model)
        self.lock = threading.RLock()
        self._submitted: set[Request] = set()
        self._finished: list[RequestOutput] = []
        self._closed = self._stepping = False
        if draft_tokenizer is not None and draft_model is None:
            raise ValueError("draft_tokenizer is given without a draft_model")
        tokenizers = tokenizer_pair(tokenizer, draft_tokenizer)
        self._speculation = speculation_settings(speculation, draft_model), draft_model, tokenizers
        self._set_up()

    def _set_up(self) -> None:
        """Look at the model; make all that depends on what kind of numbers it computes, and where."""
        model, config = self._model(), self.config
        self.team = Team.of(model)
        if self.team is not None:
            refuse_tiers(config)
        self.facts = model_facts(model)
        verify_forward(model, self.facts)
        self.backend, self.backend_reason = choose_backend(config.backend, self.facts.device.type)
        layers = list(self.facts.layers)
        pages = pool_pages(config, self.facts)
        pages = pages if self.team is None else self.team.least(pages)
        self.store = KVStore(layers, pages, config.page_size, kv_dtype(config, self.facts), self.facts.device)
        self.forward = PagedForward(self._model, self.store, config.backend)
        self.validity = Validity(self._model)
        settings = core_settings(config, self.facts)
        own = self.team is None  # graphs over several processes are not tried
        self.stepper = make_stepper(config, self.forward, self.store, settings) if own else None
        self._mark_graphs()
        self.core = EngineCore(
            self.forward if self.team is None else InStep(self.forward, self.team),
            self.store,
            settings,
            decode=self._decode if self.tokenizer is not None else None,
            encode=self._encode if self.tokenizer is not None else None,
            device=self.facts.device,
            tiers=make_tiers(config, self.facts, self.store, self._identity),
            measured=None if self.team is None else self.team.first,
            stepper=self.stepper,
        )
        self._drafters: dict[Any, tuple[Pair | None, Drafter]] = {}
        self.speculator = self.speculator_for(*self._speculation)

    def speculator_for(
        self,
        config: SpeculationConfig | None,
        draft_model: torch.nn.Module | None = None,
        tokenizers: Pair | None = None,
    ) -> Speculator | None:
        """Who drafts with these settings; None: nobody.

        Args:
            tokenizers: the model's and the draft model's, where they may differ.

        Raises:
            ValueError: the draft model, or the number of layers, is of no use here.
        """
        if config is None or config.off:
            return None
        drafter = make_drafter(self, config, draft_model, tokenizers, self._drafters)
        return self.core.drafting.speculator(config, drafter)

    # -- whole calls

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        raise_errors: bool = False,
    ) -> list[RequestOutput]:
        """Answer prompts; results in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: for all prompts, or one for each. Default: `SamplingParams()`.
            use_tqdm: show progress.
            raise_errors: raise the first error instead of leaving it in `RequestOutput.error`.
        """
        prompts = listed(prompts)
        results: list[RequestOutput | None] = [None] * len(prompts)
        bar = None
        if use_tqdm:
            from tqdm.auto import tqdm

            bar = tqdm(total=len(prompts), unit="request")
        with closing(self._run(prompts, sampling_params)) as run, closing(bar) if use_tqdm else nullcontext():
            for index, output in run:
                if raise_errors and output.error is not None:
                    raise output.error
                results[index] = output
                if bar is not None:
                    bar.update()
        return results

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yields each result as soon as it is finished. Closing the iterator cancels the rest."""
        with closing(self._run(listed(prompts), sampling_params)) as run:
            for _, output in run:
                yield output

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Tokens of one prompt as they come. Closing the iterator cancels the request."""
        with self.lock:
            request = self._submit_one(prompt, sampling_params)
        feed = EventFeed(request, self._decode if self.tokenizer is not None else None)
        try:
            done = False
            while not done:
                with self.lock:
                    if not request.ended:
                        self._step()
                    done, events = request.ended, feed.take()
                yield from events
        finally:
            self.drop([request])
        if request.error is not None:
            raise request.error

    def score(
        self,
        contexts: Prompt | Sequence[Prompt],
        continuations: Any,
        *,
        truncate: bool = False,
        cache_salt: str | None = None,
        use_tqdm: bool = False,
        raise_errors: bool = False,
    ) -> Any:
        """Log-probabilities of texts behind others; nothing is generated.

        Tokens that contexts share are computed once, and logits only behind tokens that are scored; continuations that
        differ in their last token alone cost one row of logits together. Texts are tokenised as
        lm-evaluation-harness does: context and continuation as one text, spaces at the end of a context with what
        follows. An empty context is the BOS token, or EOS where there is none.

        Args:
            contexts: a text, a list of token ids, or a list of either.
            continuations: for one context a text, token ids, or a list of either; for several a list of these.
            truncate: cut contexts that are too long at their beginning; else they are refused.
            cache_salt: share KV with requests of the same salt only.
            use_tqdm: show progress.
            raise_errors: raise the first error instead of leaving it in `Score.error`.
        Returns:
            A `Score` for each continuation, in the shape of `continuations`.
        Raises:
            ValueError: there is no tokenizer, or the two do not go together.
        """
        options = {"truncate": truncate, "cache_salt": cache_salt, "use_tqdm": use_tqdm, "raise_errors": raise_errors}
        return score_all(self, contexts, continuations, **options)

    def perplexity(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        window: int | None = None,
        stride: int | None = None,
        use_tqdm: bool = False,
        raise_errors: bool = False,
    ) -> list[Score]:
        """Log-probabilities of whole documents, however long: each token is scored once, the first behind BOS.

        Args:
            texts: a text, a list of token ids, or a list of either.
            window: tokens of one forward. Default: as many as the engine takes.
            stride: tokens scored in each window but the first, behind `window - stride + 1` others; the less, the more
                context a token has, and the longer it takes. Default: `window`.
            use_tqdm, raise_errors: as in `score`.
        Returns:
            One `Score` a text, with `logprob` and `perplexity`.
        """
        return perplexities(self, texts, window, stride, use_tqdm=use_tqdm, raise_errors=raise_errors)

    # -- the loop, for whoever owns it

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

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to give."""
        return self.core.busy or bool(self._finished) or any(request.ended for request in self._submitted)

    # -- sight

    def stats(self) -> EngineStats:
        """Counters since the engine was made, or since `reset_stats`."""
        return self.core.stats()

    def speculation_stats(self) -> SpeculationStats:
        """What became of drafts, since the engine was made."""
        return self.core.drafting.stats(self.core.recorder)

    def reset_stats(self) -> None:
        """Begin counting anew."""
        self.core.reset_stats()

    def tree_summary(self, limit: int = 10) -> TreeSummary:
        """The prefixes that are kept, the most used first, with their token counts. Print it."""
        with self.lock:
            prefixes = self.core.memory.prefixes
            if prefixes is None:
                return TreeSummary(0, 0, ())
            return summarise(prefixes.tree, self._decode if self.tokenizer is not None else None, limit)

    def forget(self) -> None:
        """Forget all KV: for changes of the model that it cannot see (see `hf_paged.integrations.validity`).

        Requests that run compute theirs again.
        """
        with self.lock:
            self.forward.refresh()
            self._mark_graphs()
            self.core.forget(self._identity() if self.core.second is not None else "")

    def save_prefixes(self, path: str | os.PathLike) -> Path:
        """Write all kept prefixes, tokens and KV in clear, to a safetensors file for `load_prefixes` elsewhere.

        Args:
            path: the file, or a directory, which gets `prefixes.safetensors`. The file is returned.
        Raises:
            ValueError: prefix caching is off.
            OSError: the file cannot be written; what was there before still is.
        """
        with self.lock:
            refuse_files(self.team)
            self.begin()
            return save_prefixes(self._prefix_memory(), self.store, path, self._identity())

    def load_prefixes(self, path: str | os.PathLike) -> int:
        """Add the prefixes of a file that `save_prefixes` wrote, as far as pages are free.

        Returns:
            tokens added.
        Raises:
            ValueError: prefix caching is off, or the file is refused (`PrefixFileRefused`): it is damaged, or from
                other weights, another dtype or page size. Nothing has changed.
        """
        with self.lock:
            refuse_files(self.team)
            self.begin()
            return load_prefixes(self._prefix_memory(), self.store, path, self._identity())

    def target(self) -> torch.nn.Module:
        """The model."""
        return self._model()

    def _prefix_memory(self) -> Memory:
        if self.core.memory.prefixes is None:
            raise ValueError("prefix_caching=False: this engine keeps no prefixes")
        return self.core.memory

    def _mark_graphs(self) -> None:
        """Captured steps are dropped unless the model is, but for its numbers, what they were captured with."""
        if self.stepper is not None:
            known = self.validity.known
            self.stepper.forget((type(self.forward.run), known.structure, [place for place, _ in known.places]))

    def _identity(self) -> str:
        """Names the model's KV, in any process."""
        return identity(self._model())

    def check(self) -> None:
        """Verify the laws of memory; raises AssertionError where one does not hold."""
        with self.lock:
            self.core.check()

    def close(self) -> None:
        """Cancel what runs and free the KV memory."""
        with self.lock:
            for request in list(self.core.requests):
                self.core.cancel(request.request_id)
            if self.stepper is not None:
                self.stepper.forget()
            self._closed = True
            self.store.release()
            for _, drafter in self._drafters.values():
                if drafter.store is not None:
                    drafter.store.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside

    def begin(self) -> None:
        """Before requests are queued: refuse when closed, look at the model anew when nothing runs."""
        if self._closed:
            raise ValueError("the engine is closed")
        if self.core.busy:
            return
        weight = self._model().get_input_embeddings().weight
        if (weight.device, weight.dtype) != (self.facts.device, self.facts.dtype):
            self._set_up()
        elif self._anywhere(self.validity.begin()):
            self.forget()
        else:
            self.forward.refresh()
        for key, (_, drafter) in list(self._drafters.items()):
            if isinstance(key, weakref.ref) and key() is None:  # the draft model is gone
                del self._drafters[key]
                self.core.drafting.drop(drafter)
            else:
                drafter.forward.refresh()

    def draw_seed(self) -> int:
        """A seed from torch's generator; of several processes, from the first one's."""
        seed = draw_seed()
        return seed if self.team is None else self.team.first(seed)

    def _anywhere(self, flag: bool) -> bool:
        """Whether it holds here or in another process that holds a part of the model."""
        return flag if self.team is None else self.team.any(flag)

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
                self.core.roster.arrange(list(pending))
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

    def advance(self, requests: list[Request]) -> None:
        """Compute one batch, unless another thread has just brought all of `requests` to their end."""
        with self.lock:
            if not all(request.ended for request in requests):
                self._step()

    @property
    def stepping(self) -> bool:
        """Whether this very thread is inside a step: a processor or a criterion that uses the engine."""
        with self.lock:
            return self._stepping

    def _step(self) -> StepResult:
        if self._stepping:
            raise RuntimeError("a step is under way: what it calls (a processor, a criterion) cannot make another")
        try:
            self._stepping = True
            if self._anywhere(self.validity.step()):  # the model was changed under running requests
                self.validity.begin()
                self.forget()
            result = self.core.step()
        except BaseException:
            if self.team is not None:
                self.team.leave()
            raise
        finally:
            self._stepping = False
            if not self.core.busy:
                self.validity.rest()
        for request in result.finished:
            if request in self._submitted:
                self._submitted.discard(request)
                self._finished.append(request.output(self._text))
        return result

    def drop(self, requests: list[Request]) -> None:
        """Cancel those that have not ended."""
        with self.lock:
            for request in requests:
                if not request.ended:
                    self.core.cancel(request.request_id)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, row: Row) -> str:
        if self.tokenizer is None:
            return ""
        text = self._decode(row.output_ids)
        return text if row.text_length is None else row.text.text[: row.text_length]
