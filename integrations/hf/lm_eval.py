"""lm-evaluation-harness on an engine: the model type `hf-paged`.

It takes all arguments of lm-eval's own `hf`, which it is but for the computing: models, tokenizers, chat templates and
tokenisation are `HFLM`'s. Importing this module registers it; `hf-paged lm-eval` is lm-eval's command with that done.
(Versions of lm-eval behind 0.4.13 find it by the entry point in pyproject.toml.)
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_paged.config import EngineConfig
from hf_paged.integrations.attention import CannotDrive
from hf_paged.integrations.engine import Engine
from hf_paged.integrations.generate import generate as paged_generate
from hf_paged.integrations.registry import REGISTRY
from hf_paged.integrations.scoring import ScoringRun, cut_left
from hf_paged.integrations.scoring_texts import Pair
from hf_paged.outputs import Score

NAME = "hf-paged"
# What generation may ask for while all requests run as one batch: no kind of beam search.
SAMPLING = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample"}
SAMPLING |= {"temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"}
ALL = 1 << 40
SLICE = 4096  # requests that are tokenised, and queued, at a time


MOST_ON_CPU = 2048  # tokens of a step: nobody waits for single tokens here


class StopWhere(StoppingCriteria):
    """Ends a row whose newest tokens hold one of some texts; looks as far back as lm-eval's own criterion.

    Args:
        begin: columns of the batch before the first new token.
    """

    def __init__(self, tokenizer: Any, texts: list[str], begin: int) -> None:
        self.tokenizer, self.begin = tokenizer, begin
        self.texts = [text for text in texts if text]
        self.last = 2 + max((len(tokenizer.encode(t, add_special_tokens=False)) for t in self.texts), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool `[batch]`."""
        ends = self.tokenizer.batch_decode(input_ids[:, self.begin :][:, -self.last :])
        found = [any(text in end for text in self.texts) for end in ends]
        return torch.tensor(found, device=input_ids.device)


class PagedLM(HFLM):
    """`HFLM` whose requests run on hf_paged's engine. Batch sizes mean nothing to it: it batches as memory allows.

    Args:
        pretrained: a folder or hub name, or a model.
        draft: a model that drafts for generation: a folder or hub name, or a model.
        speculation: name of a method (`lookup`, `suffix`, ...), or a dict of fields of `SpeculationConfig`.
        settings: arguments of `HFLM`, and fields of `EngineConfig` (but `backend`, which is `HFLM`'s).

    Raises:
        ValueError: a bad setting, or a model that the engine cannot drive (the message says why).
    """

    def __init__(self, pretrained: Any, *, draft: Any = None, speculation: Any = None, **settings: Any) -> None:
        fields = [name for name in EngineConfig.__dataclass_fields__ if name in settings and name != "backend"]
        self.engine_config = EngineConfig.from_dict({name: settings.pop(name) for name in fields})
        self._encoded: dict[str, list[int]] = {}  # texts that are about to be asked for
        self._shown: tqdm | None = None  # the bar of the call that runs
        self._together = False  # whether generation runs as one batch
        super().__init__(pretrained, **settings)
        if self.device.type == "cpu" and self.engine_config.max_batch_tokens is None:
            self.engine_config = replace(self.engine_config, max_batch_tokens=MOST_ON_CPU)
        if self.backend != "causal":
            raise ValueError(f"model type {NAME} runs causal models only: use --model hf")
        if self.softmax_dtype not in (None, torch.float32):
            raise ValueError(f"softmax_dtype={self.softmax_dtype} is not allowed: {NAME} computes in float32")
        self.draft_model = self._loaded(draft) if isinstance(draft, str) else draft
        self.speculation = speculation
        with self._precision():
            self.paged_engine()  # refuses what it cannot drive now, rather than after all has been tokenised

    def _loaded(self, name: str) -> Any:
        model = self.AUTO_MODEL_CLASS.from_pretrained(name, dtype=self.model.dtype)
        return model.to(self.device).eval()

    def _precision(self) -> torch.autocast:
        kind = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=kind, enabled=kind is not None)

    def paged_engine(self) -> Engine:
        """The engine of the model."""
        try:
            return REGISTRY.engine_for(self.model, self.engine_config)
        except CannotDrive as error:
            raise ValueError(f"{NAME} cannot drive this model ({error}): use --model hf") from error

    # -- scores

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and not args and not kwargs and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens, *args, **kwargs)

    def _encode_ahead(self, requests: list[Any]) -> None:
        """Tokenise at once what `loglikelihood` is about to ask `tok_encode` for, each text once."""
        texts = set()
        for context, continuation in (request.args for request in requests):
            bare = context.rstrip()
            if bare:
                texts |= {bare, context + continuation}
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in texts if not has_bos_prefix(text, bos)]
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids = self.tokenizer(plain, verbose=False, **special)["input_ids"] if plain else ()
        self._encoded = dict(zip(plain, ids, strict=True))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each request's continuation behind its context."""
        found: list[tuple[float, bool]] = []
        with self._bar(len(requests), disable_tqdm) as self._shown:
            for first in range(0, len(requests), SLICE):
                part = requests[first : first + SLICE]
                try:
                    self._encode_ahead(part)
                    found += super().loglikelihood(part, disable_tqdm=True)
                finally:
                    self._encoded = {}
        return found

    def _bar(self, total: int, disable_tqdm: bool) -> tqdm:
        return tqdm(total=total, disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")

    def _scores(self, pairs: list[Pair], done: Any) -> list[Score]:
        """Scores of pairs; `done` is called with the index and score of each as soon as it is there."""
        scores: list[Any] = [None] * len(pairs)
        pairs = [cut_left(pair, self.max_length) for pair in pairs]
        with self._precision(), closing(iter(ScoringRun(self.paged_engine(), pairs))) as run:
            for index, score in run:
                if score.error is not None:
                    raise score.error
                scores[index] = score
                done(index, score)
                if self._shown is not None:
                    self._shown.update()
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        def done(index: int, score: Score) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], (score.logprob, score.is_greedy))

        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        return [(score.logprob, score.is_greedy) for score in self._scores(pairs, done)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each request's text, over windows as long as the model takes, none overlapping."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for number, window in enumerate(map(utils.make_disjoint_window, windows)):
                pairs.append(Pair(*window, shared=number == 0))
                owners.append(owner)
        totals, left = [0.0] * len(requests), Counter(owners)

        def done(index: int, score: Score) -> None:
            owner = owners[index]
            totals[owner] += score.logprob
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, totals[owner])

        with self._bar(len(pairs), disable_tqdm) as self._shown:
            self._scores(pairs, done)
        return totals

    # -- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`'s, with all requests in one continuous batch where the engine can run them."""
        self._together = all(request.args[1].keys() <= SAMPLING for request in requests)
        before = self.batch_size_per_gpu
        try:
            if self._together:
                self.batch_size_per_gpu = ALL
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = before

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        if not self._together:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        temperature = generation_kwargs.pop("temperature", 0.0)
        if generation_kwargs.setdefault("do_sample", temperature > 0):
            generation_kwargs["temperature"] = temperature
        with self._precision():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([StopWhere(self.tokenizer, stop, context.shape[1])]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                custom_generate=paged_generate,
                engine_config=self.engine_config,
                draft_model=self.draft_model,
                speculation=self.speculation,
                **generation_kwargs,
            )


if NAME not in model_registry:
    model_registry.register(NAME, target=PagedLM)
