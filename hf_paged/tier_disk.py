"""Evicted pages in a directory of safetensors files, which several processes may share and which outlives them.

One file a page: pages leave the pool one at a time, and what comes back together is cut anew by every prompt; so a page
is read without its neighbours, and a damaged file costs one page. A file's name is a digest of identity, layout, salt
and tokens, so that a process finds what another wrote without reading it. The name only says where to look: tokens and
salt stand in the file and are compared, and a checksum covers all of it.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch

from hf_paged.kernels.fp8 import all_finite
from hf_paged.kv_files import TEMPORARY, BadFile, layout, pack, read_file, replace_file, require_match
from hf_paged.store import KVStore
from hf_paged.tiers import Tier, page_row, row_elements

logger = logging.getLogger("hf_paged")

KIND = "hf_paged page 1"
SUFFIX = ".safetensors"
RESCAN = 64  # pages written, at least, between two looks at what other processes have written and removed
LEFT_BEHIND = 3600  # seconds after which a file that was never finished belongs to a process that died


class _Found(NamedTuple):
    name: str
    path: memoryview  # the tokens' bytes, int32
    salt: str  # as JSON


class DiskTier(Tier):
    """Pages in files of `folder`, which is made if it is missing. See `Tier`.

    When a file cannot be written (the disk is full, the folder read-only), a warning says why and the tier writes no
    more; what is there is still read. Files that vanish are misses. Damaged files are misses too, and removed. Files of
    other identities or layouts are left alone, and not counted.

    Args:
        max_bytes: what the files of this identity may have together; beyond, those used least recently (by any
            process, by their time of modification) are removed. Processes that write at the same time may exceed it by
            what the others wrote since this one last looked.
        identity: names the weights.
        look: whether pages that this process does not know of are looked for in the folder, by name. It costs a look
            at the file system for each `count` and `fetch`.

    Attributes:
        stopped: why the tier writes no more, or None.
    """

    def __init__(
        self, store: KVStore, folder: str | os.PathLike, max_bytes: int, identity: str, look: bool = False
    ) -> None:
        super().__init__(store, max_bytes)
        self.folder, self.look = Path(folder), look
        self.stopped: str | None = None
        self._warned = False
        if not isinstance(identity, str) or not identity:
            raise ValueError(f"identity={identity!r} is not allowed: text that names the weights")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._stop(error)
        self.clear(identity)

    def put(self, tokens: Sequence[int], salt: str | None, page: int) -> bool:
        """See `Tier.put`. False: the tier writes no more, or has no identity, or a page alone exceeds its limit."""
        self._require_path(tokens)
        if self.identity is None:
            return False
        found = self._names(tokens, salt, len(tokens) // self.page_size - 1)[0]
        if found.name in self._files:
            self._touch(found)
            return True
        if self._find(found.name):
            return True
        if self.stopped is not None:
            return False
        data = self._pack(found, page)
        if not self._make_room(len(data)):
            return False
        try:
            replace_file(self.folder / found.name, data)
        except OSError as error:
            self._stop(error)
            return False
        self._bad.discard(found.name)
        self._learn(found.name, len(data))
        self.puts += 1
        return True

    def clear(self, identity: str | None = None) -> None:
        """Forget all files, which stay where they are.

        Args:
            identity: names the weights from now on: their files are looked up. None: the tier rests, and neither finds
                nor takes pages, until it is given one.
        """
        self.identity = identity
        key = json.dumps([identity, layout(self.store)], sort_keys=True).encode()
        self._key = blake2b(key, digest_size=16).digest()
        self._prefix = f"kv-{self._key.hex()[:16]}-"
        self._files: OrderedDict[str, int] = OrderedDict()  # name → bytes, least recently used first
        self._bad: set[str] = set()  # damaged, and perhaps still there
        self.pages = self.bytes = 0
        self.refresh()

    def refresh(self) -> None:
        """Look at what is in the folder now: other processes write to it and remove files."""
        found: list[tuple[int, str, int]] = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(self._prefix):
                    with suppress(OSError):  # it vanished
                        self._see(entry, found)
        if self.identity is None:
            found = []
        self._files = OrderedDict((name, size) for _, name, size in sorted(found))
        self.pages, self.bytes = len(self._files), sum(self._files.values())
        self._rescan_at = self.puts + max(RESCAN, len(self._files) // 8)

    def _see(self, entry: os.DirEntry, found: list[tuple[int, str, int]]) -> None:
        info = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode) or entry.name in self._bad:
            return
        if entry.name.endswith(SUFFIX):
            found.append((info.st_mtime_ns, entry.name, info.st_size))
        elif entry.name.endswith(TEMPORARY) and info.st_mtime < time.time() - LEFT_BEHIND:
            os.unlink(entry.path)

    # -- names

    def _names(self, tokens: Sequence[int], salt: str | None, first: int) -> list[_Found]:
        """Names of all pages of `tokens` from page index `first` on."""
        if salt is not None and not isinstance(salt, str):
            raise ValueError(f"salt={salt!r} is not allowed: a str or None")
        try:
            path = array("i", tokens).tobytes()
        except (OverflowError, TypeError) as error:
            raise ValueError(f"tokens must be int32: {error}") from error
        width, text, out = array("i").itemsize * self.page_size, json.dumps(salt), []
        digest, view = blake2b(text.encode(), digest_size=16, key=self._key), memoryview(path)
        for index in range(len(tokens) // self.page_size):
            digest.update(view[index * width : (index + 1) * width])
            if index >= first:
                name = f"{self._prefix}{digest.hexdigest()}{SUFFIX}"
                out.append(_Found(name, view[: (index + 1) * width], text))
        return out

    def _locate(self, tokens: Sequence[int], salt: str | None, first: int, end: int) -> list[_Found]:
        if self.identity is None or not (self._files or self.look) or first >= end:
            return []
        found = []
        for each in self._names(tokens[: end * self.page_size], salt, first):
            if each.name not in self._files and not (self.look and self._find(each.name)):
                break
            found.append(each)
        return found

    def _find(self, name: str) -> bool:
        """Whether another process has written a file."""
        if name in self._bad:
            return False
        try:
            info = os.stat(self.folder / name, follow_symlinks=False)
        except OSError:
            return False
        if stat.S_ISREG(info.st_mode):
            self._learn(name, info.st_size)
        return name in self._files

    # -- files

    def _pack(self, found: _Found, page: int) -> bytes:
        tokens = torch.frombuffer(bytearray(found.path), dtype=torch.int32)
        metadata = {**layout(self.store), "identity": self.identity, "salt": found.salt}
        return pack(KIND, {"tokens": tokens, "kv": page_row(self.store, page).cpu()}, metadata)

    def _load(self, found: _Found) -> torch.Tensor | None:
        try:
            tensors, metadata = read_file(self.folder / found.name, KIND)
            return self._verified(tensors, metadata, found)
        except FileNotFoundError:
            self._forget(found.name)
        except (OSError, BadFile) as error:
            self._drop(found.name, error)
        return None

    def _verified(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], found: _Found) -> torch.Tensor:
        require_match(metadata, self.store, self.identity)
        tokens, row = tensors.get("tokens"), tensors.get("kv")
        if tokens is None or row is None or metadata.get("salt") != found.salt:
            raise BadFile("it is of another salt, or holds no page")
        if tokens.dtype != torch.int32 or tokens.numpy().tobytes() != found.path:
            raise BadFile("it is of other tokens")
        if row.dtype != self.store.dtype or row.shape != (row_elements(self.store),) or not all_finite(row):
            raise BadFile("its KV is of another shape or dtype, or not finite")
        return row

    def _touch(self, found: _Found) -> None:
        if found.name in self._files:
            self._files.move_to_end(found.name)
            with suppress(OSError):  # for other processes; best effort
                now = time.time_ns()
                os.utime(self.folder / found.name, ns=(now, now))

    def _learn(self, name: str, size: int) -> None:
        self._forget(name)
        self._files[name] = size
        self.pages, self.bytes = len(self._files), self.bytes + size

    def _forget(self, name: str) -> None:
        self.bytes -= self._files.pop(name, 0)
        self.pages = len(self._files)

    def _drop(self, name: str, error: Exception) -> None:
        """A file cannot be read. One that is damaged is of no use to anybody."""
        self._forget(name)
        self._bad.add(name)
        self.damaged += 1
        if isinstance(error, BadFile):
            with suppress(OSError):
                os.unlink(self.folder / name)
        if not self._warned:
            self._warned = True
            logger.warning("%s is passed over, as others will be from now on: %s", self.folder / name, error)

    def _make_room(self, size: int) -> bool:
        """Whether a file of `size` bytes may be written, after others were removed."""
        if self.puts >= self._rescan_at:
            self.refresh()
        if size > self.max_bytes:
            return False
        while self.bytes + size > self.max_bytes:
            name = next(iter(self._files))
            try:
                os.unlink(self.folder / name)
                self.evictions += 1
            except FileNotFoundError:
                pass  # another process removed it
            except OSError as error:
                self._stop(error)
                return False
            self._forget(name)
        return True

    def _stop(self, error: OSError) -> None:
        if self.stopped is None:
            self.stopped = str(error)
            logger.warning("no more pages are written to %s: %s", self.folder, error)
