"""CPU ops compiled on first use by the machine's own C compiler. Optional: without one, the torch ops do the same.

The files of `csrc` take some seconds to compile and are kept in the user's cache folder, by source, compiler and
processor. They run on the threads of torch's own OpenMP, so that `torch.set_num_threads` governs them and no second
pool competes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from hf_paged.kernels.groups import Groups
from hf_paged.kernels.seen import Seen

SOURCES = sorted(Path(__file__).with_name("csrc").glob("*.[ch]"))
# Sums may be reordered, but infinities stay what they are.
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp", "-std=gnu11", "-w")
EXACT = {
    "sampling": ("-fno-fast-math", "-ffp-contract=off"),  # here what is compared is rounded as torch rounds it
    # Here a line's sums are the same whatever stands beside it, and whoever norms it.
    "elementwise": ("-fno-associative-math",),
    "tiles": ("-fno-associative-math",),
    "amx": ("-fno-associative-math",),
    "grouped_amx": ("-fno-associative-math",),  # what is taken apart is what is left
}
SECONDS = 300  # for one file, on a busy machine
_I, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_Byte = ctypes.c_char


def address(array: np.ndarray | None) -> int | None:
    """Where the numbers of an array lie."""
    if array is None:
        return None
    try:
        return ctypes.addressof(_Byte.from_buffer(array))  # a third of the time of the other ways
    except (TypeError, ValueError):  # it is empty, in pieces, or not to be written
        return array.__array_interface__["data"][0]


class GroupedStep:
    """What all layers of a step tell `NativeOps.grouped` alike, made once."""

    def __init__(self, table: np.ndarray, seen: Seen, groups: Groups) -> None:
        self.groups = groups
        arrays = (table, seen.line_of, seen.context, groups.own, groups.members, groups.part_start, groups.parts)
        arrays = (*arrays, groups.segments, seen.visible, seen.base)
        numbers = table.shape[1], len(seen.line_of), len(groups.segments), len(groups.members)
        # The fields of `step` in `grouped.c`, all of 64 bits.
        self._fields = np.array([*(address(array) or 0 for array in arrays), *numbers], np.int64)
        self._alive = arrays
        self.address = address(self._fields)


class NativeOps:
    """The compiled ops; all tensors are float32 and on the CPU, contiguous where nothing else is said.

    Attributes:
        amx: whether the processor multiplies tiles of bfloat16, and may be used so.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.amx = library, bool(library.tiles_by_amx(1))
        self._decode, self._norm, self._rotate = library.decode_attention, library.rms_norm, library.rotate_and_store
        self._decode.argtypes = [_P, _P, _I] + [_P] * 3 + [_I, _P, _P] + [_I] * 6 + [_F, _P, _F, _P, _P, _P]
        self._grouped = library.grouped_attention
        self._grouped.argtypes = [_P, _P, _I] + [_P] * 3 + [_I] * 5 + [_F, _F, _P]
        self._norm.argtypes, self._norm.restype = [_P, _P, _P, _F, _I, _I], None
        self._silu_mul = library.silu_mul
        self._silu_mul.argtypes, self._silu_mul.restype = [_P, _P, _I, _I], None
        self._rotate.argtypes, self._rotate.restype = [_P] * 8 + [_I] * 8, None

    def attention(self, query, key_pages, value_pages, table, seen: Seen, scale, softcap, sinks):
        """Each query by itself: `[queries, heads, dim]` → `[queries, heads, value_dim]`.

        Query `i` reads line `seen.line_of[i]` of `table` (int64 `[lines, width]`).
        """
        rows, heads, dim = query.shape
        _, kv_heads, size, value_dim = value_pages.shape
        query, out = _lines(query), query.new_empty(rows, heads, value_dim)
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        failed = self._decode(
            out.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            key_pages.data_ptr(),
            value_pages.data_ptr(),
            address(table),
            table.shape[1],
            address(seen.line_of),
            address(seen.context),
            rows,
            heads,
            kv_heads,
            dim,
            value_dim,
            size,
            scale,
            address(seen.begin),
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            address(seen.visible),
            address(seen.base),
        )
        if failed:
            raise MemoryError(f"no memory for the scores of {rows} rows of up to {int(seen.context.max())} tokens")
        return out

    def grouped(self, query, key_pages, value_pages, step: GroupedStep, scale, softcap, sinks):
        """As `attention`, with the slots of groups computed for many queries at once. Without windows."""
        rows, heads, dim = query.shape
        _, kv_heads, size, value_dim = value_pages.shape
        query, out = _lines(query), query.new_empty(rows, heads, value_dim)
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        failed = self._grouped(
            out.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            key_pages.data_ptr(),
            value_pages.data_ptr(),
            step.address,
            heads,
            kv_heads,
            dim,
            value_dim,
            size,
            scale,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for the parts of {rows} rows, {len(step.groups.members)} of them shared")
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Lines of `x` `[..., width]` over their root mean square, times `weight` `[width]`."""
        x, out = x.contiguous(), torch.empty(x.shape)
        width = weight.shape[0]
        self._norm(out.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width)
        return out

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu of the first half of each line of `x` `[lines, 2 * width]`, times the second half: `[lines, width]`."""
        lines, width = x.shape[0], x.shape[1] // 2
        out = torch.empty(lines, width)
        self._silu_mul(out.data_ptr(), x.data_ptr(), lines, width)
        return out

    def rotate_and_store(self, query, key, value, cos, sin, key_pages, value_pages, slots) -> None:
        """Rotate `query` and `key` in place by `cos` and `sin` `[tokens, dim]`, and store `key` and `value`.

        All three are `[tokens, heads, dim]`, the heads of a token one after another.
        """
        tokens, heads, dim = query.shape
        tensors = (query, key, value, cos, sin, key_pages, value_pages, slots)
        lines = (query.stride(0), key.stride(0), value.stride(0))
        self._rotate(*(t.data_ptr() for t in tensors), *lines, tokens, heads, key.shape[1], dim, key_pages.shape[2])


def _lines(x: torch.Tensor) -> torch.Tensor:
    """`x` `[tokens, heads, dim]` with the heads of a token one after another; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def matrix_lines(x: torch.Tensor) -> torch.Tensor:
    """`x` `[lines, n]` with the numbers of a line one after another; lines may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def native_ops() -> NativeOps | None:
    """The compiled ops, or None where there are none (`native_status` says why)."""
    return native_status()[0]


@lru_cache(maxsize=1)
def native_status() -> tuple[NativeOps | None, str]:
    """The compiled ops or None, and where they come from or why there are none."""
    if os.environ.get("HF_PAGED_NATIVE", "1") == "0":
        return None, "HF_PAGED_NATIVE is 0"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    runtime = _openmp_of_torch()
    if compiler is None or runtime is None:
        return None, "there is no C compiler" if compiler is None else "torch runs without GNU OpenMP"
    try:
        path = _compiled(compiler)
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)  # the symbols that `path` leaves open
        ops = NativeOps(ctypes.CDLL(str(path)))
        return ops, f"compiled by {compiler}" + (", some products by AMX" if ops.amx else "")
    except subprocess.TimeoutExpired:
        return None, f"compiling took more than {SECONDS} seconds"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return None, f"compiling failed: {output.strip().splitlines()[0] if output.strip() else error!r}"


def _openmp_of_torch() -> str | None:
    """Path of the GNU OpenMP library that torch runs on. scikit-learn, among others, loads one of its own."""
    try:
        with open("/proc/self/maps") as lines:
            paths = {line.split()[-1] for line in lines if "/libgomp" in line}
    except OSError:
        return None
    own = {path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)}
    found = own or paths
    return found.pop() if len(found) == 1 else None


def _compiled(compiler: str) -> Path:
    """The library's path, compiled if the cache has none for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    with open("/proc/cpuinfo") as lines:
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    key = hashlib.sha256(
        "\0".join([*(path.read_text() for path in SOURCES), *FLAGS, repr(EXACT), version, processor]).encode()
    ).hexdigest()[:20]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_paged"
    try:
        base.mkdir(parents=True, exist_ok=True)
        target = base / f"native-{key}.so"
    except OSError:
        target = Path(tempfile.mkdtemp(prefix="hf_paged-")) / f"native-{key}.so"

    def compile_one(arguments: list[str]) -> None:
        subprocess.run([compiler, *arguments], capture_output=True, text=True, check=True, timeout=SECONDS)

    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            units = {path: f"{folder}/{path.stem}.o" for path in SOURCES if path.suffix == ".c"}
            steps = [[*FLAGS, *EXACT.get(path.stem, ()), "-c", str(path), "-o", unit] for path, unit in units.items()]
            # Linked without OpenMP: torch's runtime serves.
            steps.append(["-shared", *units.values(), "-lm", "-o", f"{folder}/native.so"])
            with ThreadPoolExecutor() as pool:
                list(pool.map(compile_one, steps[:-1]))
            compile_one(steps[-1])
            os.replace(f"{folder}/native.so", target)
    return target
