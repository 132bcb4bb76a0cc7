"""A model and its core: made for what the model is, told when it changes, stepped for whoever has requests in it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from hf_paged.config import EngineConfig
from hf_paged.engine import EngineCore
from hf_paged.integrations.cuda_step import make_stepper
from hf_paged.integrations.drafters import make_drafter
from hf_paged.integrations.few_stepper import FewStepper
from hf_paged.integrations.inspect import PagedForward, model_facts, verify_forward
from hf_paged.integrations.lean import LeanForward
from hf_paged.integrations.parallel import InStep, Team, refuse_tiers
from hf_paged.integrations.sizing import core_settings, kv_dtype, make_tiers, pool_pages
from hf_paged.integrations.validity import Validity, identity
from hf_paged.integrations.vocabularies import Pair
from hf_paged.kernels import choose_backend
from hf_paged.outcomes import StepResult
from hf_paged.seeds import draw_seed
from hf_paged.speculation.config import SpeculationConfig
from hf_paged.speculation.drafter import Drafter
from hf_paged.speculation.speculator import Speculator
from hf_paged.speculation.stats import SpeculationStats
from hf_paged.stats import EngineStats
from hf_paged.store import KVStore


class ModelEngine:
    """Steps requests through one model.

    Args:
        model: gives it.
        config, tokenizer: see `Engine`.
        speculation: arguments of `speculator_for`, for requests that do not say otherwise.

    Attributes:
        core: the loop. store: KV. forward: plan → logits, by the model. team: the processes that share it, or None.
        facts: what kind of model it is. validity: whether it is what it was. lock: held by whoever uses any of these.
        speculator: who drafts for such requests, or None.
    """

    def __init__(
        self,
        model: Callable[[], torch.nn.Module],
        config: EngineConfig,
        tokenizer: Any,
        speculation: tuple[SpeculationConfig | None, torch.nn.Module | None, Pair | None],
    ) -> None:
        self._model, self.config, self.tokenizer, self._speculation = model, config, tokenizer, speculation
        self.lock = threading.RLock()
        self._closed = self._stepping = self._looked = False
        self._set_up()

    def _set_up(self) -> None:
        """Look at the model; make all that depends on what kind of numbers it computes, and where."""
        self._ready = False  # after an interrupt in here all is made anew
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
        self.forward = PagedForward(self._model, self.store, config.backend, config.compile, config.pack_weights)
        self.validity = Validity(self._model)
        settings = core_settings(config, self.facts)
        own = self.team is None  # graphs over several processes are not tried
        self.stepper = make_stepper(config, self.forward, self.store, settings) if own else None
        if own and self.stepper is None and self.facts.device.type == "cpu":
            self.stepper = FewStepper(self.forward, config.page_size)
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
        self._ready = True

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

    def target(self) -> torch.nn.Module:
        """The model."""
        return self._model()

    def forget(self) -> None:
        """Forget all KV: for changes of the model that it cannot see (see `hf_paged.integrations.validity`).

        Requests that run compute theirs again.
        """
        with self.lock:
            self.forward.refresh(anew=True)
            self._mark_graphs()
            self.core.forget(self._identity() if self.core.second is not None else "")
            self.core.drafting.look_again(closely=True)
            self.validity.stale = False

    def stats(self) -> EngineStats:
        """Counters since the engine was made, or since `reset_stats`."""
        return self.core.stats()

    def speculation_stats(self) -> SpeculationStats:
        """What became of drafts, since the engine was made."""
        return self.core.drafting.stats(self.core.recorder)

    def reset_stats(self) -> None:
        """Begin counting anew."""
        self.core.reset_stats()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what the model is now

    def begin(self) -> None:
        """Before requests are queued: refuse when closed, look at the model anew. Requests that run then go on with
        what it is now; copies of weights are looked at when nothing runs, and no look is needed within a step."""
        if self._closed:
            raise ValueError("the engine is closed")
        busy = self.core.busy
        if busy and (self._stepping or self._looked):
            return
        if not self._ready or self._is_other_kind():
            self._end_all()
            self._set_up()
        elif busy:
            if self._anywhere(self.validity.glance()):
                self.forget()
        elif self._anywhere(self.validity.begin()) or self._anywhere(self.forward.refresh(known=self.validity.known)):
            self.forget()
        self._looked = True
        if busy:
            return
        for key, (_, drafter) in list(self._drafters.items()):
            if isinstance(key, weakref.ref) and key() is None:  # the draft model is gone
                del self._drafters[key]
                self.core.drafting.drop(drafter)
        self.core.drafting.look_again()

    def _is_other_kind(self) -> bool:
        """Whether the model computes elsewhere or with other numbers than its KV here."""
        weight = self._model().get_input_embeddings().weight
        return (weight.device, weight.dtype) != (self.facts.device, self.facts.dtype)

    def _end_all(self) -> None:
        """No request can go on with a model of another kind."""
        was = f"{self.facts.dtype} on {self.facts.device}"
        self.core.fail(ValueError(f"the model was moved or cast while this ran: its KV is of {was}"))

    def draw_seed(self) -> int:
        """A seed from torch's generator; of several processes, from the first one's."""
        seed = draw_seed()
        return seed if self.team is None else self.team.first(seed)

    def _anywhere(self, flag: bool) -> bool:
        """Whether it holds here or in another process that holds a part of the model."""
        return flag if self.team is None else self.team.any(flag)

    def _mark_graphs(self) -> None:
        """Captured steps are dropped unless the model is, but for its numbers, what they were captured with."""
        if self.stepper is not None:
            known = self.validity.known
            self.stepper.forget((type(self.forward.run), known.structure, [addresses for _, addresses in known.places]))

    def _identity(self) -> str:
        """Names the model's KV, in any process."""
        return identity(self._model())

    # -- steps

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
                if self._is_other_kind():
                    self._end_all()
                self.validity.begin()
                self.forget()
            self._looked = False
            self.forward.vouch(self.validity.known)
            result = self.core.step()
            if not self.core.busy and not isinstance(self.forward.run, LeanForward):
                # An adapter may have come since these requests did, and leave before the next look: KV of it is noted.
                self.validity.glance()
        except BaseException:
            if self.team is not None:
                self.team.leave()
            raise
        finally:
            self._stepping = False
            if not self.core.busy:
                self.validity.rest()
        return result

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
