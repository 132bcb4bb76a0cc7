"""What a model is: shapes of its KV, limits, ids; and whether the engine can drive it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_paged.integrations.attention import CannotDrive, Evaluation, ModuleForward, switch_lock
from hf_paged.integrations.compiled import CompiledCall
from hf_paged.integrations.lean import LeanForward
from hf_paged.kernels.native_blocks import FewModel
from hf_paged.memory import Memory
from hf_paged.plan import PlanRow, build_plan
from hf_paged.store import KVStore, LayerShape

DRIVABLE_LAYERS = ("full_attention", "sliding_attention", "attention")


@dataclass(frozen=True)
class ModelFacts:
    """Shapes and limits of a causal language model.

    Attributes:
        layers: KV shape of every layer.
        dtype, device: of its KV.
        vocab_size: ids that its embedding takes.
        max_positions: tokens that it was made for, or None.
        steady_length: tokens up to which positions mean the same whatever else a forward holds, or None: always.
        eos_ids: ids that end a text, from its generation config.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int | None
    steady_length: int | None
    eos_ids: tuple[int, ...]


def model_facts(model: nn.Module) -> ModelFacts:
    """Read the facts off the model and one forward of two tokens with its default cache.

    Raises:
        CannotDrive: it has no causal attention in every layer, or no cache of keys and values.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise CannotDrive("it is an encoder-decoder")
    kinds = set(getattr(config, "layer_types", None) or ())
    odd = sorted(kinds - set(DRIVABLE_LAYERS))
    if odd:
        raise CannotDrive(f"it has layers of type {', '.join(odd)}")
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample"):
        if not getattr(getattr(model, name, None), "__module__", "").startswith("transformers."):
            raise CannotDrive(f"it has a {name} of its own")
    embedding = model.get_input_embeddings()
    try:
        with switch_lock(model), torch.no_grad(), Evaluation(model) as moment, moment:
            ids = torch.zeros(1, 2, dtype=torch.long, device=embedding.weight.device)
            cache = getattr(model(input_ids=ids, use_cache=True, return_dict=True), "past_key_values", None)
    except Exception as error:  # it may need more than token ids; if it is broken, its caller will be told
        raise CannotDrive(f"it does not run on token ids alone ({type(error).__name__}: {error})") from error
    layers = _layer_shapes(cache)
    eos = getattr(model.generation_config, "eos_token_id", None)
    return ModelFacts(
        layers=layers,
        dtype=cache.layers[0].keys.dtype,
        device=embedding.weight.device,
        vocab_size=embedding.num_embeddings,
        max_positions=getattr(config, "max_position_embeddings", None),
        steady_length=_steady_length(config),
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),),
    )


def _layer_shapes(cache: Any) -> tuple[LayerShape, ...]:
    shapes = []
    for layer in getattr(cache, "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or not isinstance(values, torch.Tensor):
            raise CannotDrive("its cache holds more than keys and values")
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3]))
    if not shapes:
        raise CannotDrive("it has no cache of keys and values")
    return tuple(shapes)


def _steady_length(config: Any) -> int | None:
    """Rotary embeddings of type "dynamic" and "longrope" change for all tokens once one of a forward lies beyond."""
    given = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in [given, *(part for part in given.values() if isinstance(part, dict))]:
        kind = rope.get("rope_type") or ""
        if "dynamic" in kind:
            limits.append(config.max_position_embeddings - 1)  # at this very length some state of older calls is kept
        elif kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits, default=None)


class PagedForward:
    """Plan → logits, the lean way where the model allows it, else through its own forward.

    `refresh` looks at the model again: adapters, hooks or patched modules may have come or gone.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        store: KVStore,
        backend: str = "auto",
        compiled: bool = False,
        pack: bool | str = "auto",
    ) -> None:
        self.model, self.store, self.backend, self.pack = model, store, backend, pack
        self._compile, self.compiled = compiled, None
        self.run: LeanForward | ModuleForward | None = None
        self._known: object | None = None
        self.refresh()

    def refresh(self, anew: bool = False, known: object | None = None) -> bool:
        """Look at the model.

        Args:
            anew: keep no copies of its weights, whatever they look like.
            known: the same at two looks if the model is, but for what copies of weights alone can tell.

        Returns:
            whether copies of weights tell of a change that nobody else may have seen.
        """
        if known is not None and known is self._known and isinstance(self.run, LeanForward):
            if self.run.good():
                return False
            self._build(anew=True)
            return True
        self._known = known
        return not self._build(anew)

    def _build(self, anew: bool) -> bool:
        """Make what runs the model as it is now. Returns whether copies of weights that were kept are still good."""
        before = self.run
        lean = LeanForward.build(self.model(), self.store, self.backend, self.pack)
        kept = lean.keep(before) if lean is not None and isinstance(before, LeanForward) and not anew else True
        if lean is None and self._compile and self.compiled is None:
            self.compiled = CompiledCall(len(self.store.layers))
        self.run = lean if lean is not None else ModuleForward(self.model, self.store, self.compiled)
        return kept

    def __call__(self, plan) -> torch.Tensor:
        return self.run(plan)

    def logits(self, plan) -> torch.Tensor:
        """Logits in a dtype that may be the model's own."""
        return self.run.logits(plan) if isinstance(self.run, LeanForward) else self.run(plan)

    def vouch(self, known: object) -> None:
        """The model's weights are where they were when `known` was made."""
        if isinstance(self.run, LeanForward):
            self.run.vouched = known

    def few_model(self) -> FewModel | None:
        """See `LeanForward.few_model`."""
        return self.run.few_model() if isinstance(self.run, LeanForward) else None


def _check_windows(config: Any, windows: dict[int, int | None]) -> None:
    """Whether each layer's attention asks for the window that its config has: some leave that to the mask alone."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    for layer, asked in windows.items():
        slides = kinds[layer] == "sliding_attention" if kinds else True
        wanted = window if slides else None
        if asked != wanted:
            raise CannotDrive(f"attention of layer {layer} asks for window {asked}, its config for {wanted}")


def verify_forward(model: nn.Module, facts: ModelFacts) -> None:
    """Hold packed, paged logits of a few tokens in two rows, in two steps, against the model's own, a row at a time.

    Raises:
        CannotDrive: they differ, or the model's code cannot work on pages.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    length = window + 3 if isinstance(window, int) and 0 < window <= 64 else 5
    rows = [[(7 * i + 3) % facts.vocab_size for i in range(length)], [(5 * i + 1) % facts.vocab_size for i in range(3)]]
    store = KVStore(list(facts.layers), 2 * length + 8, 2, facts.dtype, facts.device)
    forward, memory = PagedForward(lambda: model, store, pack=False), Memory(store.num_pages, store.page_size)
    sequences = [memory.open(list(row)) for row in rows]
    got = []
    try:
        for counts in ([length - 1, 2], [1, 1]):
            for sequence, count in zip(sequences, counts, strict=True):
                memory.reserve(sequence, count)
            plan = build_plan([PlanRow(None, s, n, 1) for s, n in zip(sequences, counts, strict=True)], 2, facts.device)
            got.append(forward(plan))
            for sequence, count in zip(sequences, counts, strict=True):
                memory.commit(sequence, count)
    except CannotDrive:
        raise
    except Exception as error:
        raise CannotDrive(f"its code does not work on pages ({type(error).__name__}: {error})") from error
    _check_windows(config, getattr(forward.run, "windows", {}))
    with switch_lock(model), torch.no_grad(), Evaluation(model) as moment, moment:
        for i, row in enumerate(rows):
            ids = torch.tensor([row], device=facts.device)
            own = model(input_ids=ids, return_dict=True).logits[0, -2:].float()
            ours = torch.stack([part[i] for part in got])
            if not _alike(ours, own, facts.dtype):
                worst = float((ours - own).abs().max())
                raise CannotDrive(f"paged logits differ from its own by {worst:.3g}")


def _alike(ours: torch.Tensor, own: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by rounding only.

    In half precision any two orders of summing differ by some percent of what a model's logits vary by (5 % with 32
    random layers), and of a million logits one differs by five times as much: there the mean square counts.
    """
    if dtype == torch.float32:
        largest = float(own.nan_to_num(0, 0, 0).abs().max() + 1e-3)
        # A model that gives NaN is told so at each row, not here.
        return torch.allclose(ours, own, atol=2e-3 * largest, rtol=2e-3, equal_nan=True)
    same = torch.equal(ours.isfinite(), own.isfinite())
    ours, own = ours.nan_to_num(0, 0, 0), own.nan_to_num(0, 0, 0)
    return same and float((ours - own).norm()) <= 0.1 * float(own.norm()) + 1e-3
