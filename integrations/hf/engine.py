"""`Engine`: continuous batching over a transformers model, for whoever does not come through `generate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from hf_paged.config import EngineConfig, is_int
from hf_paged.integrations.drafters import speculation_settings
from hf_paged.integrations.events import EventFeed
from hf_paged.integrations.parallel import refuse_files
from hf_paged.integrations.prompts import Prompt, listed
from hf_paged.integrations.request_engine import RequestEngine
from hf_paged.integrations.scoring import perplexities, score_all
from hf_paged.integrations.summary import TreeSummary, summarise
from hf_paged.integrations.vocabularies import tokenizer_pair
from hf_paged.memory import Memory
from hf_paged.outputs import RequestOutput, Score, TokenEvent
from hf_paged.params import SamplingParams
from hf_paged.saved import load_prefixes, save_prefixes
from hf_paged.speculation.config import SpeculationConfig


class Engine(RequestEngine):
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
        if draft_tokenizer is not None and draft_model is None:
            raise ValueError("draft_tokenizer is given without a draft_model")
        tokenizers = tokenizer_pair(tokenizer, draft_tokenizer)
        drafting = speculation_settings(speculation, draft_model), draft_model, tokenizers
        super().__init__(model_ref or (lambda: model), config, tokenizer, drafting)

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
        cache_salt: str | None = None,
        use_tqdm: bool = False,
        raise_errors: bool = False,
    ) -> list[Score]:
        """Log-probabilities of whole documents, however long: each token is scored once, the first behind BOS.

        Args:
            texts: a text, a list of token ids, or a list of either.
            window: tokens of one forward. Default: as many as the engine takes.
            stride: tokens scored in each window but the first, behind `window - stride + 1` others; the less, the more
                context a token has, and the longer it takes. Default: `window`.
            cache_salt, use_tqdm, raise_errors: as in `score`.

        Returns:
            One `Score` a text, with `logprob` and `perplexity`.
        """
        options = dict(cache_salt=cache_salt, use_tqdm=use_tqdm, raise_errors=raise_errors)
        return perplexities(self, texts, window, stride, **options)

    # -- prefixes that are kept

    def tree_summary(self, limit: int = 10) -> TreeSummary:
        """The prefixes that are kept, the most used first, with their token counts. Print it.

        Raises:
            ValueError: `limit` is no integer of at least 0.
        """
        if not is_int(limit) or limit < 0:
            raise ValueError(f"limit={limit!r} is not allowed: an integer of at least 0")
        with self.lock:
            prefixes = self.core.memory.prefixes
            if prefixes is None:
                return TreeSummary(0, 0, ())
            return summarise(prefixes.tree, self._decode if self.tokenizer is not None else None, limit)

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

    def _prefix_memory(self) -> Memory:
        if self.core.memory.prefixes is None:
            raise ValueError("prefix_caching=False: this engine keeps no prefixes")
        return self.core.memory
