"""Which backend runs the ops, why, and what happens where its kernels do not compile."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

DEVICES = ("cuda", "xpu")  # ROCm's cards are "cuda" to torch

# What a card reports of itself: no matter of what was to run on it.
CARD_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))

_failure: list[str] = []  # why the Triton kernels are not used any more
_no_prefill: list[str] = []  # why `prefill.py` is not


def choose_backend(wanted: str, device_type: str) -> tuple[str, str]:
    """Name of the backend to use, and why.

    Args:
        wanted: `auto`, `torch` or `triton`.
        device_type: type of the model's device, as in `torch.device.type`.

    Raises:
        ValueError: `triton` is wanted where its kernels cannot run.
    """
    if wanted == "torch":
        return "torch", "asked for"
    problem = _problem(device_type)
    if wanted == "triton":
        if problem is not None:
            raise ValueError(f"EngineConfig.backend='triton' is not allowed: {problem}; auto or torch")
        return "triton", f"asked for, Triton {_version()}" + _interpreted(device_type)
    if device_type == "cpu":
        from hf_paged.kernels.native import native_status

        ops, how = native_status()
        return "torch", f"the model is on a CPU; {'float32 ops ' if ops else 'no compiled ops: '}{how}"
    if problem is not None:
        return "torch", problem
    if _failure:
        return "torch", f"the Triton kernels do not run here: {_failure[0]}"
    return "triton", f"the model is on {device_type}, Triton {_version()}"


def runs_triton(device_type: str, backend: str) -> bool:
    """Whether a step on such a device goes to the Triton kernels (which may not serve its shapes)."""
    if backend == "torch" or _failure or (device_type == "cpu" and backend != "triton"):
        return False
    return _problem(device_type) is None


def told(error: Exception) -> str:
    """What went wrong, for a warning."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500]


def with_fallback(run: Callable[..., Any], instead: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the Triton op `run` gives; where its kernel does not compile or start, one warning and `instead`, for good.

    Raises:
        torch.OutOfMemoryError, torch.AcceleratorError: what the card reports of itself is no matter of kernels.
    """
    return _or_instead(_failure, "the Triton kernels do not run here, torch's ops do", run, instead, *args, **kwargs)


def with_extend(run: Callable[..., Any], instead: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same for prefill by `prefill.py`, whose place the kernel for all cards takes."""
    if _no_prefill:
        return instead(*args, **kwargs)
    note = "prefill.py does not run here, extend.py does"
    return _or_instead(_no_prefill, note, run, instead, *args, **kwargs)


def _or_instead(failures: list[str], note: str, run: Callable[..., Any], instead: Callable[..., Any], *args, **kwargs):
    try:
        return run(*args, **kwargs)
    except CARD_ERRORS:
        raise
    except Exception as error:
        if _interpreting():  # a fault of the kernel's, which a fallback would hide from its tests
            raise
        failures.append(told(error))
        warnings.warn(f"hf_paged: {note} instead, slower ({failures[0]})", RuntimeWarning, stacklevel=4)
        return instead(*args, **kwargs)


@cache
def _problem(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on such a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed (the model is on {device_type})"
    if device_type == "cpu" and not _interpreting():
        return "on a CPU the Triton kernels run under TRITON_INTERPRET=1 only"
    if device_type not in (*DEVICES, "cpu"):
        return f"there are no Triton kernels for {device_type}"
    try:
        import hf_paged.kernels.triton_path  # noqa: F401
    except Exception as error:
        return f"Triton does not import ({type(error).__name__}: {error})"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _interpreted(device_type: str) -> str:
    return ", interpreted" if device_type == "cpu" else ""


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
