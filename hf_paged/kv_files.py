"""Safetensors files of KV: with a checksum, written whole or not at all. What is read is not trusted, nor unpickled."""

from __future__ import annotations

import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch

from hf_paged.store import KVStore

TEMPORARY = ".tmp"
HEADER_LIMIT = 100_000_000  # bytes; that of safetensors


class BadFile(ValueError):
    """A file is damaged, or not what was asked for. The message says why, without its path."""


def layout(store: KVStore) -> dict[str, str]:
    """What KV of another store must agree on to be read into this one, as metadata of a file."""
    shapes = [[s.kv_heads, s.key_dim, s.value_dim] for s in store.layers]
    return {
        "dtype": str(store.dtype).removeprefix("torch."),
        "page_size": str(store.page_size),
        "layers": json.dumps(shapes),
    }


def require_match(metadata: dict[str, str], store: KVStore, identity: str) -> None:
    """Refuse KV of another layout, dtype or identity than those of `store`.

    Raises:
        BadFile: the first that differs.
    """
    ours = layout(store)
    for name, what in (("dtype", "dtype"), ("page_size", "page size"), ("layers", "layers [kv_heads, keys, values]")):
        if metadata.get(name) != ours[name]:
            raise BadFile(f"it is of another {what}: {metadata.get(name)}, not {ours[name]}")
    if metadata.get("identity") != identity:
        raise BadFile(f"it is of other weights: {metadata.get('identity')}, not {identity}")


def checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of names, shapes and bytes of all tensors (contiguous, on the CPU) and of the metadata but itself."""
    text = json.dumps(sorted((name, value) for name, value in metadata.items() if name != "crc32"))
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def pack(kind: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file that `read_file(path, kind)` takes.

    Args:
        tensors: contiguous, on the CPU.
    """
    from safetensors.torch import save

    metadata = {**metadata, "kind": kind}
    return save(tensors, {**metadata, "crc32": checksum(tensors, metadata)})


def replace_file(path: Path, data: bytes, sync: bool = False) -> None:
    """Make `data` the content of `path` in one step: readers find the old file or the new one.

    Args:
        sync: wait until the bytes are on the disk.
    Raises:
        OSError: it cannot be written, or `path` is no file (a device, say); what was there still is.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is there and no file")
    temporary = path.with_name(f"{path.name[:80]}.{uuid4().hex}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_file(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a file that `pack` made.

    The file is read, not mapped: another process that shortens a mapped file would end this one.

    Raises:
        BadFile: it is damaged, or of another kind; then its tensors were not read.
        OSError: it cannot be read.
    """
    from safetensors.torch import load

    with open(path, "rb") as file:
        metadata = _metadata(file.read(8), file.read)
        if metadata.get("kind") != kind:
            raise BadFile(f"it is no file of the kind {kind!r}, but {metadata.get('kind')!r}")
        file.seek(0)
        data = file.read()
    try:
        tensors = load(data)
    except Exception as error:  # whatever a parser makes of bytes from outside
        raise BadFile(f"it is damaged or truncated: {error}") from error
    if checksum(tensors, metadata) != metadata.get("crc32"):
        raise BadFile("it is damaged: its checksum is another")
    return tensors, metadata


def _metadata(head: bytes, read) -> dict[str, str]:
    size = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= size <= HEADER_LIMIT:
        raise BadFile("it is damaged or truncated: it does not begin like a safetensors file")
    header = read(size)
    try:
        metadata = json.loads(header).get("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata must be text")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadFile(f"it is damaged or truncated: its header cannot be read: {error}") from error
    return metadata
