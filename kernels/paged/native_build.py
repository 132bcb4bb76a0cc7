"""The compiled CPU ops as a library: compiled when they are first asked for, and kept.

The files of `csrc` take some seconds to compile. What comes of them is kept by source, compiler and processor, in the
user's cache folder or, where that cannot be written, in one of the user's own among temporary files. Behind it stands
its digest: a file that a full disk cut short would kill the process that loads it, so it is made anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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
DIGEST = hashlib.sha256().digest_size


def compiler_of(environment: dict[str, str]) -> list[str] | None:
    """The C compiler, with its arguments: what `CC` says, or what is there; None: none is."""
    if environment.get("CC"):
        return shlex.split(environment["CC"])
    found = shutil.which("cc") or shutil.which("gcc")
    return [found] if found else None


def openmp_of_torch() -> str | None:
    """Path of the GNU OpenMP library that torch runs on. scikit-learn, among others, loads one of its own."""
    try:
        with open("/proc/self/maps") as lines:
            paths = {line.split()[-1] for line in lines if "/libgomp" in line}
    except OSError:
        return None
    own = {path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)}
    found = own or paths
    return found.pop() if len(found) == 1 else None


def built(compiler: Sequence[str]) -> Path:
    """The library's path, compiled if no folder has it whole for this source, compiler and processor.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, or written anywhere.
    """
    version = _run([*compiler, "--version"])
    with open("/proc/cpuinfo") as lines:
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    told = [*(path.read_text() for path in SOURCES), *FLAGS, repr(EXACT), *compiler, version, processor]
    name = f"native-{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:20]}.so"
    cache = _cache_folder()
    writable = cache is not None and os.access(cache, os.W_OK | os.X_OK)
    for folder in (cache, None if writable else _own_folder()):
        if folder is not None and _is_whole(folder / name):
            return folder / name
    target = (cache if writable else _own_folder() or Path(tempfile.mkdtemp(prefix="hf_paged-"))) / name
    _build(compiler, target)
    return target


def _cache_folder() -> Path | None:
    """The user's cache folder, made if it is not there; None where there can be none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_paged"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the user has no home
        return None
    return folder


def _own_folder() -> Path | None:
    """One among temporary files that nobody else can write to; None where another has taken its name."""
    folder = Path(tempfile.gettempdir()) / f"hf_paged-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if private else None


def _is_whole(library: Path) -> bool:
    """Whether it is there, with the digest of the rest at its end."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _build(compiler: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        units = {path: f"{folder}/{path.stem}.o" for path in SOURCES if path.suffix == ".c"}
        steps = [[*FLAGS, *EXACT.get(path.stem, ()), "-c", str(path), "-o", unit] for path, unit in units.items()]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda step: _run([*compiler, *step]), steps))
        made = Path(folder) / "native.so"
        _run([*compiler, "-shared", *units.values(), "-lm", "-o", str(made)])  # without OpenMP: torch's runtime serves
        with made.open("ab") as library:
            library.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, target)


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
