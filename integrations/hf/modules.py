"""What a model is made of, in one pass: torch's own iterators are generators in generators, and take milliseconds for a
small model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import nn


class Momentary:
    """What is changed in a model for a moment. Entered twice: `with Replaced(...) as moment, moment:`.

    An interrupt can come as an exit begins, and anywhere in it: then the other exit restores all. So too where the
    inner entry is interrupted, which alone changes anything.
    """

    _held = False

    def __enter__(self) -> Self:
        if self._held:
            self._change()
        self._held = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _change(self) -> None:
        raise NotImplementedError

    def _restore(self) -> None:
        """All as it was, however much of it was changed."""
        raise NotImplementedError


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, in the same order."""
    found: dict[int, nn.Module] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            stack += reversed(module._modules.values())
    return list(found.values())


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Their own parameters, each once."""
    return _each_once(module._parameters for module in modules)


def buffers_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Their own buffers, each once."""
    return _each_once(module._buffers for module in modules)


def configs_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Their configs, each once."""
    owners = (m for m in modules if "config" in vars(m) or hasattr(type(m), "config"))
    return _each_once({"config": m.config} for m in owners)


def _each_once(parts: Iterable[dict[str, Any]]) -> list[Any]:
    return list({id(each): each for part in parts for each in part.values() if each is not None}.values())
