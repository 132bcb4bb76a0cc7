"""The model's own forward under `torch.compile`: one graph, attention over pages an op in it.

What modelling code leaves as many small kernels (norms, rotation, gates, residuals) is fused: Ansel et al., "PyTorch
2", ASPLOS 2024. Captured decode steps hold what it made.
"""

from __future__ import annotations

import types
import warnings
from typing import Any

import torch


def _call(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs)


class CompiledCall:
    """Calls a model, compiled; with a warning, and for good, as it is where the compiler fails.

    Attributes:
        failure: why it is not compiled any more, or None.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        # What was compiled is kept by code object: this one's is its own.
        own = types.FunctionType(_call.__code__.replace(), _call.__globals__, "_call")
        self._run = torch.compile(own, dynamic=True)

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        if self.failure is not None:
            return _call(model, inputs)
        try:
            return self._run(model, inputs)
        except (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError)):
            raise
        except Exception as error:
            out = _call(model, inputs)  # if the model itself is at fault, its error is the one to tell
            self.failure = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500]
            note = f"hf_paged: torch.compile does not take this model, it runs as it is ({self.failure})"
            warnings.warn(note, RuntimeWarning, stacklevel=2)
            return out
