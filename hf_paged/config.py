"""Settings of an engine: frozen, validated at the door."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

BACKENDS = ("auto", "torch", "triton")
KV_DTYPES = ("auto", "fp8")


def require(ok: bool, name: str, value: object, allowed: str, owner: str = "EngineConfig") -> None:
    """Raise the `ValueError` that every refused setting gives: its name, its value and what is allowed."""
    if not ok:
        raise ValueError(f"{owner}.{name}={value!r} is not allowed: {allowed}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use and how it schedules.

    Attributes:
        page_size: tokens a page, 1 to 256.
        num_pages: pages in the pool. Default: what `memory_fraction` allows.
        memory_fraction: share of memory for KV pages when `num_pages` is not given. On CUDA it is a share of the free
            device memory (default 0.8), taken at once; on a CPU a share of the available memory (default 0.4), as an
            upper limit: pages cost memory only once they are written.
        max_model_len: tokens a sequence may have, prompt included. Default: the model's position limit.
        max_batch_tokens: tokens computed in one step (prompt chunks and decodes together). Default 512 on a CPU, 8192
            on CUDA.
        max_sequences: sequences that run at the same time.
        seed: from which the seeds of requests without one derive. Default: drawn from torch's global generator, so that
            `torch.manual_seed` makes runs repeatable.
        prefix_caching: keep the KV of prompts and answers, for requests that begin with the same tokens, until its
            pages are needed.
        host_cache_bytes: host memory for pages that a model on another device has no room for any more (0: none).
        disk_cache: a directory for pages that the pool has no room for any more; they outlive the process, and several
            processes may share it. It holds prompts and their KV in clear.
        disk_cache_bytes: what its files may have together.
        track_optimum: count what a prefix cache without limits would have found (`EngineStats.optimal_tokens`; it keeps
            all tokens ever served).
        kv_dtype: `auto`: KV in the model's own dtype; `fp8`: in 8 bits (e4m3), half the memory of 16 bits. Keys and
            values are rounded by up to 1/16 of themselves, so tokens may be others than those of `generate`.
        backend: `auto`, `torch` or `triton` for the attention ops. `auto` takes Triton's where the device has them
            (CUDA, ROCm, XPU), else torch's; `triton` on a CPU needs TRITON_INTERPRET=1 (slow; meant for tests).
        cuda_graphs: run steps in which all rows decode as CUDA graphs, several at a time, with tokens drawn on the
            device. `auto`: where the device and the model allow it; True: refused where they do not; False: never.
        compile: run the blocks of the model's own forward under `torch.compile`, where no leaner forward takes its
            place (Llama, Mistral, Qwen2, Qwen3 have one). The first steps take up to a minute.
        pack_weights: keep copies of a float32 model's weights in an order that a CPU multiplies sooner: tiles of
            bfloat16 where that holds every weight exactly (half the memory of the weights, about twice the speed), else
            in oneDNN's order (as much as the weights). `auto`: tiles up to an eighth of the memory that the process may
            have, else for models of up to 64 MB; True: tiles whatever they take; False: no copies.
        check: run `Memory.check()` after every step (slow; meant for tests).
    """

    page_size: int = 16
    num_pages: int | None = None
    memory_fraction: float | None = None
    max_model_len: int | None = None
    max_batch_tokens: int | None = None
    max_sequences: int = 128
    seed: int | None = None
    prefix_caching: bool = True
    host_cache_bytes: int = 0
    disk_cache: str | os.PathLike | None = None
    disk_cache_bytes: int = 4 << 30
    track_optimum: bool = False
    kv_dtype: str = "auto"
    backend: str = "auto"
    cuda_graphs: bool | str = "auto"
    compile: bool = False
    pack_weights: bool | str = "auto"
    check: bool = False

    def __post_init__(self) -> None:
        size = self.page_size
        require(is_int(size) and 1 <= size <= 256, "page_size", size, "an integer from 1 to 256")
        for name in ("num_pages", "max_model_len", "max_batch_tokens"):
            value = getattr(self, name)
            require(value is None or (is_int(value) and value >= 1), name, value, "an integer of at least 1, or None")
        value = self.max_sequences
        require(is_int(value) and value >= 1, "max_sequences", value, "an integer of at least 1")
        value = self.memory_fraction
        ok = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1)
        require(ok, "memory_fraction", value, "a number over 0 and up to 1, or None")
        both = self.num_pages is not None and self.memory_fraction is not None
        require(not both, "memory_fraction", value, f"give it or num_pages ({self.num_pages}), not both")
        for name in ("host_cache_bytes", "disk_cache_bytes"):
            value = getattr(self, name)
            require(is_int(value) and value >= 0, name, value, "an integer of at least 0")
        ok = self.disk_cache is None or isinstance(self.disk_cache, str | os.PathLike)
        require(ok, "disk_cache", self.disk_cache, "a path or None")
        if self.disk_cache is not None:
            require(not os.path.isfile(self.disk_cache), "disk_cache", self.disk_cache, "a directory: this is a file")
            require(self.disk_cache_bytes > 0, "disk_cache_bytes", self.disk_cache_bytes, "over 0 with a disk_cache")
        require(self.seed is None or is_int(self.seed), "seed", self.seed, "an integer or None")
        for name in ("prefix_caching", "track_optimum", "compile", "check"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("cuda_graphs", "pack_weights"):
            value = getattr(self, name)
            require(isinstance(value, bool) or value == "auto", name, value, "True, False or 'auto'")
        require(self.kv_dtype in KV_DTYPES, "kv_dtype", self.kv_dtype, f"one of {', '.join(KV_DTYPES)}")
        require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> EngineConfig:
        """Build from a mapping, refusing unknown names.

        Raises:
            ValueError: on an unknown name or a bad value.
        """
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise ValueError(f"unknown engine setting {name!r}: allowed are {', '.join(names)}")
        return cls(**settings)


@dataclass(frozen=True)
class CoreSettings:
    """What `EngineCore` needs to know, all decided: limits, ids that end a row, the vocabulary.

    `max_logits`: rows of logits that one step may hold behind tokens of prompts.
    """

    max_batch_tokens: int
    max_sequences: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    check: bool = False
    backend: str = "auto"
    prefix_caching: bool = False
    track_optimum: bool = False
    max_logits: int = 1 << 60


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping (`MemAvailable`), or half of all where that is unknown."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _physical_memory() // 2


def allowed_memory() -> int:
    """Bytes of memory that this process may have: all of the machine's, or its control group's limit."""
    total = _physical_memory()
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as limit:
                total = min(total, int(limit.read()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return total


def _physical_memory() -> int:
    """Bytes of the machine's memory; 8 GiB where that is unknown."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30
