"""The blocks of a model's own forward under `torch.compile`: those that are alike share a graph, attention an op in it.

What modelling code leaves as many small kernels (norms, rotation, gates, residuals) is fused: Ansel et al., "PyTorch
2", ASPLOS 2024. Captured decode steps hold what it made.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_paged.integrations.modules import Momentary
from hf_paged.kernels.backends import CARD_ERRORS, told

MOST_GRAPHS = 64  # of blocks that differ, of one token alone and of more; behind them blocks run as they are


def _forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    return type(module).forward(module, *args, **kwargs)


class BlockForward:
    """Stands in a block for its forward, while it is run compiled."""

    def __init__(self, block: nn.Module, run: Callable[..., Any]) -> None:
        self._block, self._run = block, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._block, args, kwargs)


def blocks_of(model: nn.Module, layers: int) -> list[nn.Module]:
    """The modules, one a layer, that most of a forward goes through; none where they are not to be found, or where
    someone has put forwards of his own in place of theirs."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            replaced = [vars(block)["forward"] for block in module if "forward" in vars(block)]
            return list(module) if all(isinstance(forward, BlockForward) for forward in replaced) else []
    return []


class Replaced(Momentary):
    """Blocks whose forwards are compiled."""

    def __init__(self, blocks: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        self.blocks, self._run = blocks, run

    def _change(self) -> None:
        for block in self.blocks:
            block.forward = BlockForward(block, self._run)

    def _restore(self) -> None:
        for block in self.blocks:
            vars(block).pop("forward", None)


class CompiledCall:
    """Calls a model whose blocks are compiled (all of it, where it has no blocks); with a warning, and for good, as it
    is where the compiler fails.

    Args:
        layers: how many have KV.

    Attributes:
        failure: why it is not compiled any more, or None.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.failure: str | None = None
        # What was compiled is kept by code object: this one's is its own.
        own = types.FunctionType(_forward.__code__.replace(), _forward.__globals__, "_forward")
        self._run = torch.compile(own, dynamic=True)

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if self.failure is not None:
            return model(**inputs)
        try:
            return self._compiled(model, inputs)
        except CARD_ERRORS:
            raise
        except Exception as error:
            out = model(**inputs)  # if the model itself is at fault, its error is the one to tell
            self.failure = told(error)
            note = f"hf_paged: torch.compile does not take this model, it runs as it is ({self.failure})"
            warnings.warn(note, RuntimeWarning, stacklevel=2)
            return out

    def _compiled(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        blocks = blocks_of(model, self.layers)
        if not blocks:
            return self._run(model, (), inputs)
        # Numbers that tell blocks apart (`layer_idx`) are inputs of their graph.
        patch = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=MOST_GRAPHS)
        with patch, Replaced(blocks, self._run) as moment, moment:
            return model(**inputs)
