"""On what a benchmark ran: written into every report, since figures mean nothing without it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = ("hf-paged", "torch", "transformers", "accelerate", "safetensors", "numpy", "triton")


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    """Name of the CPU, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that want a core, averaged over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def machine() -> dict[str, Any]:
    """CPU, cores, threads, what keeps it busy, accelerator and versions."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": processor(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "load_average": load_average(),
        "cuda_device": cuda,
        "versions": versions(),
    }
