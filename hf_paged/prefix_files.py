"""Prefixes in a file: computed once, loaded by the next process.

A file holds tokens and KV in clear, for every salt: it is as private as the prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_paged.kernels.fp8 import all_finite, raw
from hf_paged.kv_files import BadFile, layout, pack, read_file, replace_file, require_match
from hf_paged.store import KVStore

KIND = "hf_paged prefixes 1"
NAME = "prefixes.safetensors"  # in a directory


class PrefixFileRefused(ValueError):
    """A file of prefixes is not loaded. The message names it and says why."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} is refused: {reason}")
        self.path, self.reason = path, str(reason)


@dataclass(frozen=True)
class PrefixPage:
    """A page of a tree of prefixes.

    Attributes:
        parent: index of the page before it, which is full; -1 if it is the first.
        tokens: 1 to `page_size`.
        salt: whose it is; that of its parent.
        page: where its KV is in the store. Means nothing after loading.
    """

    parent: int
    tokens: tuple[int, ...]
    salt: str | None = None
    page: int = 0


class LoadedPrefixes:
    """What a file held, in host memory.

    Attributes:
        entries: its pages, parents first. Siblings may begin with the same tokens.
        bytes: of KV.
    """

    def __init__(self, entries: list[PrefixPage], keys: list, values: list, store: KVStore) -> None:
        self.entries, self._keys, self._values, self._store = entries, keys, values, store
        self.bytes = sum(tensor.nbytes for tensor in (*keys, *values))

    def copy_to(self, indices: Sequence[int], pages: Sequence[int]) -> None:
        """Copy the KV of `entries` at `indices` to `pages` of the store, one each. Slots behind their tokens become 0.

        Raises:
            ValueError: there are not as many indices as pages, or one of them does not exist.
        """
        if len(indices) != len(pages):
            raise ValueError(f"{len(indices)} indices and {len(pages)} pages are not allowed: as many")
        for name, given, least, most in (
            ("indices", indices, 0, len(self.entries) - 1),
            ("pages", pages, 1, self._store.num_pages),
        ):
            if any(not least <= each <= most for each in given):
                raise ValueError(f"{name}={list(given)} is not allowed: {least} to {most}")
        if not pages:
            return
        source = torch.tensor(indices)
        target = torch.tensor(pages, device=self._store.keys[0].device)
        for ours, theirs in ((self._store.keys, self._keys), (self._store.values, self._values)):
            for tensor, stored in zip(ours, theirs, strict=True):
                raw(tensor).index_copy_(0, target, raw(stored).index_select(0, source).to(tensor.device))


def save(path: str | os.PathLike, entries: Sequence[PrefixPage], store: KVStore, identity: str) -> Path:
    """Write the KV of `entries` to a file, whole or not at all.

    Args:
        path: the file, or a directory, which gets `prefixes.safetensors`.
        entries: parents first.
        identity: names the weights.
    Returns:
        the file.
    Raises:
        ValueError: `entries` are inconsistent.
        OSError: the file cannot be written; what was there before still is.
    """
    path, size, entries = _file(path), store.page_size, list(entries)
    if (fault := _fault(entries, size)) is not None:
        raise ValueError(f"entries are not allowed: {fault}")
    if any(not 1 <= entry.page <= store.num_pages for entry in entries):
        raise ValueError(f"entries are not allowed: a page is not in the store: 1 to {store.num_pages}")
    salts = list(dict.fromkeys(entry.salt for entry in entries))
    places = {salt: index for index, salt in enumerate(salts)}
    tensors = {
        "tokens": torch.zeros((len(entries), size), dtype=torch.int32),
        "parents": torch.tensor([entry.parent for entry in entries], dtype=torch.int32),
        "lengths": torch.tensor([len(entry.tokens) for entry in entries], dtype=torch.int32),
        "salts": torch.tensor([places[entry.salt] for entry in entries], dtype=torch.int32),
    }
    for row, entry in zip(tensors["tokens"], entries, strict=True):
        row[: len(entry.tokens)] = torch.tensor(entry.tokens, dtype=torch.int32)
    device = store.keys[0].device
    index = torch.tensor([entry.page for entry in entries], dtype=torch.int64, device=device)
    # Slots behind the tokens may hold KV of others.
    empty = torch.arange(size)[None, :] >= tensors["lengths"][:, None]
    empty = empty[:, None, :, None].to(device)
    for name, layers in (("keys", store.keys), ("values", store.values)):
        for i, tensor in enumerate(layers):
            tensors[f"{name}.{i}"] = raw(tensor).index_select(0, index).masked_fill_(empty, 0).view(store.dtype).cpu()
    metadata = {**layout(store), "identity": identity, "salts": json.dumps(salts)}
    replace_file(path, pack(KIND, tensors, metadata), sync=True)
    return path


def load(path: str | os.PathLike, store: KVStore, identity: str) -> LoadedPrefixes:
    """Read a file that `save` wrote, into host memory. Changes nothing in the store.

    Raises:
        PrefixFileRefused: it cannot be read, is damaged, was saved with another dtype, page size, layers or weights, or
            is inconsistent.
    """
    path = _file(path)
    try:
        tensors, metadata = read_file(path, KIND)
        require_match(metadata, store, identity)
        entries = _entries(tensors, metadata, store.page_size)
        keys, values = _kv(tensors, store, len(entries))
    except BadFile as error:
        raise PrefixFileRefused(path, error) from error
    except OSError as error:
        raise PrefixFileRefused(path, f"it cannot be read: {error.strerror or error}") from error
    return LoadedPrefixes(entries, keys, values, store)


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path / NAME if path.is_dir() else path


def _entries(tensors: dict[str, torch.Tensor], metadata: dict[str, str], page_size: int) -> list[PrefixPage]:
    names = ("tokens", "parents", "lengths", "salts")
    count = tensors["tokens"].shape[0] if "tokens" in tensors and tensors["tokens"].dim() else -1
    for name in names:
        shape = (count, page_size) if name == "tokens" else (count,)
        if name not in tensors or tensors[name].dtype != torch.int32 or tensors[name].shape != shape:
            raise BadFile(f"it is inconsistent: {name} are missing, or not int32 {list(shape)}")
    tokens, parents, lengths, places = (tensors[name].tolist() for name in names)
    if any(not 1 <= length <= page_size for length in lengths):
        raise BadFile(f"it is inconsistent: a page has no token, or more than {page_size}")
    try:
        salts = dict(enumerate(json.loads(metadata.get("salts", ""))))
        owners = [salts[place] for place in places]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadFile(f"it is inconsistent: its salts cannot be read: {error}") from error
    parts = zip(parents, tokens, lengths, owners, strict=True)
    entries = [PrefixPage(parent, tuple(row[:length]), salt) for parent, row, length, salt in parts]
    if (fault := _fault(entries, page_size)) is not None:
        raise BadFile(f"it is inconsistent: {fault}")
    return entries


def _fault(entries: list[PrefixPage], page_size: int) -> str | None:
    """What is wrong with a list of pages."""
    for index, entry in enumerate(entries):
        if not 1 <= len(entry.tokens) <= page_size:
            return f"page {index} has {len(entry.tokens)} tokens: 1 to {page_size}"
        if not all(0 <= token < 1 << 31 for token in entry.tokens):
            return f"page {index} has a token that is negative or too large"
        if entry.salt is not None and not isinstance(entry.salt, str):
            return f"page {index} has the salt {entry.salt!r}: a str or None"
        if not -1 <= entry.parent < index:
            return f"page {index} has the parent {entry.parent}: -1 to {index - 1}"
        if entry.parent >= 0 and len(entries[entry.parent].tokens) < page_size:
            return f"page {index} is behind page {entry.parent}, which is not full"
        if entry.parent >= 0 and entries[entry.parent].salt != entry.salt:
            return f"page {index} has another salt than its parent"
    return None


def _kv(tensors: dict[str, torch.Tensor], store: KVStore, count: int) -> tuple[list, list]:
    out: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    for name, layers in (("keys", store.keys), ("values", store.values)):
        for i, ours in enumerate(layers):
            tensor, shape = tensors.get(f"{name}.{i}"), (count, *ours.shape[1:])
            if tensor is None or tensor.dtype != ours.dtype or tensor.shape != shape:
                raise BadFile(f"it is inconsistent: {name} of layer {i} are missing, or not {ours.dtype} {list(shape)}")
            if not all_finite(tensor):
                raise BadFile(f"it is inconsistent: {name} of layer {i} are not finite")
            out[name].append(tensor)
    return out["keys"], out["values"]
