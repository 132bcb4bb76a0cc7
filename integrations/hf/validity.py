"""Whether stored KV still belongs to the model: a fingerprint of its weights, adapters and attention settings.

Counters of in-place changes (`_version`) and addresses are exact, but writes through `.data` leave both as they were;
so some numbers of every weight are compared too. A write through `.data` that changes only a few numbers of a weight
may miss all of them: `Engine.forget()` is for those.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import nn

from hf_paged.integrations.modules import buffers_of, configs_of, modules_of, parameters_of
from hf_paged.kernels.native_sums import Samples
from hf_paged.store import BITS

# Numbers of a weight that are compared at the beginning of a call, and at every step.
SAMPLES, STEP_SAMPLES = 64, 4
PLAIN_TENSORS = {nn.Parameter, torch.Tensor}


class Fingerprint:
    """What KV depends on, in a model as it is now.

    Args:
        model: any module.
        samples: numbers of every weight that are looked at.

    Attributes:
        structure: modules, their hooks and settings.
        sampled: bytes of the numbers, weight by weight.
        many, few: the numbers, if all lie in sight, and a few of those that lie on the CPU.
    """

    def __init__(self, model: nn.Module, samples: int = SAMPLES) -> None:
        modules = modules_of(model)
        self.structure, tensors = _structure(modules), _tensors(modules)
        self.tensors = [weakref.ref(t) for t in tensors]
        self.places = _places(tensors)
        self._plain = all(type(t) in PLAIN_TENSORS and not t.is_inference() for t in tensors)
        self._versions = [version for version, _ in self.places]
        self._addresses = [address for _, (address, *_) in self.places]
        views, copies = _numbers(tensors, samples)
        self.sampled = _read([*(view.numpy() for view in views), *(copy.numpy() for copy in copies)])
        # Numbers that lie in pieces or on a GPU were copied: their addresses are nobody's once these views are gone.
        in_sight = self._plain and not copies and all(t.is_contiguous() for t in tensors)
        self.many = Samples(views, samples, hold=False) if in_sight else None
        self.few = Samples(views, STEP_SAMPLES, hold=not in_sight)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Fingerprint) and self.places == other.places
        return same and self.structure == other.structure and self.sampled == other.sampled

    __hash__ = None

    def holds(self, model: nn.Module) -> bool:
        """Whether `model` is what it was, for a fourth of what another fingerprint takes; False where that cannot be
        told so."""
        return self.many is not None and self.stands(model) and self.many.same()

    def stands(self, model: nn.Module) -> bool:
        """The same but for numbers: whether its parts, settings and hooks are those that were, and no counted write
        changed a weight."""
        modules = modules_of(model)
        tensors = _tensors(modules)
        same = list(map(id, tensors)) == [id(ref()) for ref in self.tensors] and self._placed_as_before(tensors)
        return same and self.structure == _structure(modules)

    def barely_holds(self) -> bool:
        """Whether all weights are where they were, no counted write changed them, and a few numbers are the same."""
        tensors = [ref() for ref in self.tensors]  # held until all is read
        return all([t is not None for t in tensors]) and self._placed_as_before(tensors) and self.few.same()

    def _placed_as_before(self, tensors: list[torch.Tensor]) -> bool:
        if not self._plain:
            return _places(tensors) == self.places
        # Between any two steps: no calls but these.
        return [t._version for t in tensors] == self._versions and [t.data_ptr() for t in tensors] == self._addresses


class Validity:
    """Tells when stored KV is void: at the beginning of calls, and between steps.

    With the bundled model (75 weights) `begin` takes 0.4 ms where nothing has changed (1 ms behind a generation, which
    has swept the caches), and `step` 0.02 to 0.1 ms.

    Args:
        model: function that gives the model.

    Attributes:
        known: the model as it was when it was last seen to change.
        stale: whether it has changed since KV was last forgotten. Who has forgotten it sets this to False.
    """

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self.model = model
        self.known = Fingerprint(model())
        self.stale = False
        self.rest()

    def begin(self) -> bool:
        """Look at the whole model: whether it changed since KV was last forgotten."""
        return self._look(self.known.holds)

    def glance(self) -> bool:
        """The same but at its numbers, for which a host would have to wait for its device."""
        return self._look(self.known.stands)

    def _look(self, as_it_was: Callable[[nn.Module], bool]) -> bool:
        model = self.model()
        if not as_it_was(model):
            seen = Fingerprint(model)
            self.stale = self.stale or self.known != seen  # first: an interrupt may come between any two lines
            self.known = seen
        return self.stale

    def step(self) -> bool:
        """Look at a little of it, between two steps: whether it changed. On CUDA only counted writes are seen."""
        return self.stale or not self.known.barely_holds()

    def rest(self) -> None:
        """Nothing runs: hold on to no weight."""
        if self.known.few.held:
            self.known.many, self.known.few = None, Samples([], 1)


def identity(model: nn.Module) -> str:
    """A name for the KV of `model` that another process gives it too.

    Nobody can tell what a hook does, or a `forward` that was put on a module: such a model has another name each time.
    """
    return uuid4().hex if any(map(_is_altered, modules_of(model))) else name_of(model)


def name_of(model: nn.Module) -> str:
    """A name for `model` that another process gives it too: from all numbers of its weights, and settings."""
    modules = modules_of(model)
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    states = [(type(module).__name__, _own_settings(vars(module))) for module in modules]
    sums = [_sums(leaf) for tensor in _tensors(modules) for leaf in _leaves(tensor)]
    return hashlib.sha256(repr((sums, shapes, states, _settings(modules))).encode()).hexdigest()


def _is_altered(module: nn.Module) -> bool:
    """Whether it does more than its class does. (What accelerate hangs on it moves numbers and changes none.)"""
    own = vars(module)
    return "_hf_hook" not in own and ("forward" in own or any(own.get(name) for name in HOOKS[:2]))


def _sums(tensor: torch.Tensor) -> tuple[int, int]:
    """Of a tensor's bits as whole numbers, modulo 2**64: of all lines, and of each times its place."""
    if not tensor.numel():
        return 0, 0
    bits = tensor.detach().contiguous()
    bits = bits.view(BITS[bits.element_size()]) if bits.element_size() in BITS else bits.view(torch.uint8)
    lines = bits.reshape(-1, bits.shape[-1] if bits.dim() > 1 else 1).sum(1, dtype=torch.int64)
    places = torch.arange(1, len(lines) + 1, device=lines.device)
    return int(lines.sum()), int((lines * places).sum())


def _tensors(modules: list[nn.Module]) -> list[torch.Tensor]:
    """Their weights and buffers, of which a model on the meta device has none."""
    return [t for t in (*parameters_of(modules), *buffers_of(modules)) if t.device.type != "meta"]


def _structure(modules: list[nn.Module]) -> tuple[Any, ...]:
    """What they are, but for numbers."""
    return _settings(modules), tuple(map(_module_state, modules))


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What it is made of, where it is no plain tensor: its share here if it is spread over processes, or its integers
    and scales if it is quantised."""
    if type(tensor) in PLAIN_TENSORS or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [leaf for part in parts if isinstance(part, torch.Tensor) for leaf in _leaves(part)]


def _places(tensors: list[torch.Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """Version and addresses of each."""
    versions = [0 if t.is_inference() else t._version for t in tensors]
    addresses = [tuple(leaf.data_ptr() for leaf in _leaves(t)) for t in tensors]
    return list(zip(versions, addresses, strict=True))


def _numbers(tensors: list[torch.Tensor], count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Bits of up to `count` numbers of each, as whole numbers: views on a CPU, and one copy a kind from elsewhere."""
    views = [_evenly(leaf, count) for tensor in tensors for leaf in _leaves(tensor)]
    host = [view for view in views if view.device.type == "cpu"]
    elsewhere: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for view in views:
        if view.device.type != "cpu":
            elsewhere.setdefault((view.device, view.dtype), []).append(view)
    copies = [torch.cat(parts).cpu() for parts in elsewhere.values()]
    host, copies = ([view.view(BITS[view.element_size()]) for view in part] for part in (host, copies))
    return host, copies


def _evenly(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` of its numbers, evenly spaced; a view where that is possible."""
    tensor = tensor.detach()
    n = tensor.numel()
    if n <= count or not tensor.is_contiguous():
        return tensor.reshape(-1)[:: max(n // count, 1)]
    return tensor.as_strided((count,), ((n - 1) // (count - 1),))


def _read(numbers: list[np.ndarray]) -> bytes:
    """Their bytes, one after another."""
    return np.concatenate(numbers).tobytes() if numbers else b""


def _settings(modules: list[nn.Module]) -> tuple[str, ...]:
    """Settings of all their configs."""
    return tuple(repr(_plain(vars(config))) for config in configs_of(modules))


# What says where a model comes from or what `generate` does, not what its KV is.
UNRELATED = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype")
PLAIN = (str, int, float, bool, list, dict, tuple, type(None))
# What every module has: its parts, looked at elsewhere, and its mode, which the engine sees to.
OF_EVERY_MODULE = {*vars(nn.Module()), "_is_hf_initialized"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STEADY = {str, int, float, bool, type(None)}


def _plain(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((k, v) for k, v in settings.items() if k not in UNRELATED and issubclass(type(v), PLAIN))


def _module_state(module: nn.Module) -> tuple[Any, ...]:
    """Which module, what is hung on it, and its own settings: of an adapter whether it is on, merged, and its scale."""
    own = vars(module)
    hooks = [own[name] for name in HOOKS if own.get(name)]
    kind = id(module), type(module), type(module).forward, id(own.get("forward"))
    return (*kind, *map(tuple, hooks), *_own_settings(own))


def _own_settings(own: dict[str, Any]) -> list[tuple[str, Any]]:
    # `isinstance` would ask configs for their class, which takes long. Lists may be written to: they are spelled out.
    names = [name for name in own if name not in OF_EVERY_MODULE]
    return [
        (name, value if type(value) in STEADY else repr(value))
        for name in names
        if issubclass(type(value := own[name]), PLAIN)
    ]
