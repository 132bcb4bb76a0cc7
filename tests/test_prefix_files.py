"""Files of prefixes: what is saved is loaded, and everything else is refused with a reason."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

import hf_paged.kv_files as kv_files
from hf_paged.kv_files import checksum
from hf_paged.prefix_files import KIND, LoadedPrefixes, PrefixFileRefused, PrefixPage, load, save
from hf_paged.store import KVStore, LayerShape

LAYERS = [LayerShape(2, 8, 8), LayerShape(1, 4, 6), LayerShape(3, 2, 2)]
SIZE = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Two branches behind a common page, one of them with a leaf that is not full, and the same tokens of a tenant.
ENTRIES = [
    PrefixPage(-1, (1, 2, 3, 4), None, 3),
    PrefixPage(0, (5, 6, 7, 8), None, 1),
    PrefixPage(0, (5, 6, 7, 9), None, 7),
    PrefixPage(1, (9,), None, 2),
    PrefixPage(-1, (1, 2, 3, 4), "tenant ä\ud800", 5),
    PrefixPage(-1, (0, 2**31 - 1, 3), "", 6),
]


def make_store(dtype: torch.dtype = torch.float32, layers: list[LayerShape] = LAYERS, size: int = SIZE) -> KVStore:
    store = KVStore(layers, 12, size, dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*store.keys, *store.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return store


def tensors_of(store: KVStore) -> list[torch.Tensor]:
    return [*store.keys, *store.values]


def meaning(entries: list[PrefixPage]) -> list[tuple]:
    return [(entry.parent, entry.tokens, entry.salt) for entry in entries]


def rewrite(path: Path, tensors: dict | None = None, metadata: dict | None = None, drop: str = "") -> None:
    """Change a file and make its checksum right again: as its maker might have written it."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = {**load_tensors(raw), **(tensors or {})}
    tensors.pop(drop, None)
    metadata = {**header["__metadata__"], **(metadata or {})}
    metadata.pop(drop, None)
    save_file(tensors, path, {**metadata, "crc32": checksum(tensors, metadata)})


def refusal(path: Path, store: KVStore, identity: str = "weights") -> str:
    """Why a file is refused."""
    before = [tensor.clone() for tensor in tensors_of(store)]
    with pytest.raises(PrefixFileRefused) as error:
        load(path, store, identity)
    assert isinstance(error.value, ValueError) and str(error.value).startswith(str(path))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(store), strict=True))
    return error.value.reason


@pytest.fixture
def file(tmp_path) -> Path:
    return save(tmp_path / "file", ENTRIES, make_store(), "weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_is_loaded(tmp_path, dtype):
    store, other = make_store(dtype), make_store(dtype)
    path = save(tmp_path / "file", ENTRIES, store, "weights")
    assert path == tmp_path / "file"
    loaded = load(path, other, "weights")
    assert isinstance(loaded, LoadedPrefixes) and meaning(loaded.entries) == meaning(ENTRIES)
    assert loaded.bytes == len(ENTRIES) * store.bytes_per_page
    before = [tensor.clone() for tensor in tensors_of(other)]
    loaded.copy_to([5, 0, 3], [10, 11, 12])
    for ours, theirs, old in zip(tensors_of(store), tensors_of(other), before, strict=True):
        assert torch.equal(theirs[:10], old[:10])
        assert torch.equal(theirs[11], ours[3])
        assert torch.equal(theirs[10][:, :3], ours[6][:, :3]) and not theirs[10][:, 3:].any()
        assert torch.equal(theirs[12][:, :1], ours[2][:, :1]) and not theirs[12][:, 1:].any()


def test_saving_changes_nothing_in_the_store(tmp_path):
    store, fresh = make_store(), make_store()
    save(tmp_path / "file", ENTRIES, store, "weights")
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(store), tensors_of(fresh), strict=True))


def test_slots_behind_a_page_s_tokens_are_not_saved(file):
    assert not load_tensors(file.read_bytes())["keys.0"][3][:, 1:].any(), "they may be another tenant's"


def test_a_directory_gets_a_file(tmp_path):
    path = save(tmp_path, ENTRIES, make_store(), "weights")
    assert path == tmp_path / "prefixes.safetensors"
    assert len(load(tmp_path, make_store(), "weights").entries) == len(ENTRIES)
    assert [p.name for p in tmp_path.iterdir()] == ["prefixes.safetensors"]


def test_a_link_stays_one_and_what_is_no_file_stays_too(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "real")
    save(link, ENTRIES, make_store(), "weights")
    assert link.is_symlink() and len(load(tmp_path / "real", make_store(), "weights").entries) == len(ENTRIES)
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="no file"):
        save(pipe, ENTRIES, make_store(), "weights")
    assert pipe.is_fifo()


def test_nothing_can_be_saved_too(tmp_path):
    loaded = load(save(tmp_path / "file", [], make_store(), "weights"), make_store(), "weights")
    assert loaded.entries == [] and loaded.bytes == 0
    loaded.copy_to([], [])


def test_copies_that_are_not_possible_are_refused(file):
    store = make_store()
    loaded = load(file, store, "weights")
    for indices, pages in (([0], []), ([6], [1]), ([-1], [1]), ([0], [0]), ([0], [13])):
        with pytest.raises(ValueError, match="not allowed"):
            loaded.copy_to(indices, pages)


def test_a_loaded_file_may_go_away(file):
    store = make_store()
    loaded = load(file, store, "weights")
    file.write_bytes(b"")  # a mapped file would end the process here
    loaded.copy_to([0], [9])
    assert torch.equal(store.keys[0][9], store.keys[0][3])


def test_another_model_is_refused(file):
    assert "other weights: weights, not others" in refusal(file, make_store(), "others")
    assert "another dtype: float32, not bfloat16" in refusal(file, make_store(torch.bfloat16), "others")
    assert "another page size: 4, not 8" in refusal(file, make_store(size=8))
    assert "another layers" in refusal(file, make_store(layers=LAYERS[:2]))
    assert "another layers" in refusal(file, make_store(layers=LAYERS[::-1]))


def test_truncated_files_are_refused(file):
    store, whole = make_store(), file.read_bytes()
    for length in [*range(0, 20), *range(20, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert "damaged" in refusal(file, store)
    file.write_bytes(whole + b"\0")
    assert "damaged" in refusal(file, store)
    file.write_bytes(b"\0" * len(whole))
    assert "damaged" in refusal(file, store)
    file.write_bytes(whole)
    load(file, store, "weights")


def test_flipped_bits_are_noticed(file):
    store, whole, chance = make_store(), file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    sound = load(file, store, "weights")
    for at in [*range(0, header, 7), *range(header, len(whole), 41)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            loaded = load(file, store, "weights")
        except PrefixFileRefused:
            continue
        # Only white space in the header may change unnoticed.
        assert at < header and loaded.entries == sound.entries
        assert all(torch.equal(a, b) for a, b in zip(loaded._keys, sound._keys, strict=True))


def test_files_that_are_something_else_are_refused(tmp_path, file):
    store, path = make_store(), tmp_path / "other"
    assert "cannot be read: No such file" in refusal(path, store)
    save_file({"weight": torch.zeros(3)}, path)
    assert KIND in refusal(path, store)
    path.write_bytes(pickle.dumps({"keys": [1]}))
    assert "damaged" in refusal(path, store)
    for header in (
        b"[]",
        b"{" * 50_000,
        b'{"__metadata__":3}',
        b'{"__metadata__":{"kind":3}}',
        b"\xff\xfe",
        b"[" * 200_000,
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert "damaged" in refusal(path, store)
    rewrite(file, metadata={"kind": "hf_paged prefixes 2"})
    assert "prefixes 2" in refusal(file, store)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(tensors={"parents": torch.tensor([-1, 0, 0, 1, -1, 5], dtype=torch.int32)}), "parent 5"),
        (dict(tensors={"parents": torch.tensor([-1, 2, 0, 1, -1, -1], dtype=torch.int32)}), "parent 2"),
        (dict(tensors={"parents": torch.tensor([-1, 0, 0, -2, -1, -1], dtype=torch.int32)}), "parent -2"),
        (dict(tensors={"parents": torch.tensor([-1, 0, 0, 1, 3, -1], dtype=torch.int32)}), "not full"),
        (dict(tensors={"parents": torch.tensor([-1, 0, 0, 1, 1, -1], dtype=torch.int32)}), "another salt"),
        (dict(tensors={"parents": torch.zeros(6)}), "parents are missing"),
        (dict(tensors={"parents": torch.zeros(5, dtype=torch.int32)}), "parents are missing"),
        (dict(tensors={"lengths": torch.tensor([4, 4, 4, 0, 4, 3], dtype=torch.int32)}), "no token, or more than 4"),
        (dict(tensors={"lengths": torch.tensor([4, 4, 4, 5, 4, 3], dtype=torch.int32)}), "no token, or more than 4"),
        (dict(tensors={"tokens": torch.full((6, 4), -1, dtype=torch.int32)}), "negative"),
        (dict(tensors={"tokens": torch.zeros((6, 5), dtype=torch.int32)}), "tokens are missing"),
        (dict(tensors={"tokens": torch.tensor(3, dtype=torch.int32)}), "tokens are missing"),
        (dict(tensors={"salts": torch.full((6,), 9, dtype=torch.int32)}), "salts"),
        (dict(tensors={"salts": torch.full((6,), -1, dtype=torch.int32)}), "salts"),
        (dict(metadata={"salts": "[3, 4, 5]"}), "salt 3"),
        (dict(metadata={"salts": "3"}), "salts"),
        (dict(metadata={"salts": "["}), "salts"),
        (dict(tensors={"keys.1": torch.zeros(6, 1, 4, 5)}), "keys of layer 1"),
        (dict(tensors={"values.2": torch.zeros(6, 3, 4, 2).half()}), "values of layer 2"),
        (dict(tensors={"values.0": torch.full((6, 2, 4, 8), float("inf"))}), "not finite"),
        (dict(drop="keys.0"), "keys of layer 0"),
        (dict(drop="lengths"), "lengths are missing"),
        (dict(drop="salts"), "salts"),
        (dict(drop="identity"), "other weights"),
        (dict(drop="dtype"), "dtype"),
    ],
)
def test_inconsistent_files_are_refused(file, change, reason):
    rewrite(file, **change)
    assert reason in refusal(file, make_store())


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([PrefixPage(0, (1,), None, 1)], "parent 0"),
        ([PrefixPage(-1, (), None, 1)], "0 tokens"),
        ([PrefixPage(-1, (1, 2, 3, 4, 5), None, 1)], "5 tokens"),
        ([PrefixPage(-1, (1, -2), None, 1)], "negative"),
        ([PrefixPage(-1, (1, 2**31), None, 1)], "large"),
        ([PrefixPage(-1, (1,), ["a"], 1)], "salt"),
        ([PrefixPage(-1, (1,), None, 1), PrefixPage(0, (1,), None, 2)], "not full"),
        ([PrefixPage(-1, (1, 2, 3, 4), None, 1), PrefixPage(0, (1,), "a", 2)], "another salt"),
        ([PrefixPage(-1, (1,), None, 0)], "1 to 12"),
        ([PrefixPage(-1, (1,), None, 13)], "1 to 12"),
    ],
)
def test_inconsistent_pages_are_not_saved(tmp_path, entries, reason):
    with pytest.raises(ValueError, match=reason):
        save(tmp_path / "file", entries, make_store(), "weights")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["open", "fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(file, monkeypatch, what):
    def fail(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = file.read_bytes()
    with monkeypatch.context() as patch:
        if what == "open":
            patch.setattr(kv_files, "open", fail, raising=False)
        else:
            patch.setattr(os, what, fail)
        with pytest.raises(OSError, match="No space left"):
            save(file, ENTRIES[:1], make_store(), "weights")
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    save(file, ENTRIES[:1], make_store(), "weights")
    assert len(load(file, make_store(), "weights").entries) == 1


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "missing" / "file", ENTRIES, make_store(), "weights")
    assert "No such file" in refusal(tmp_path / "missing" / "file", make_store())
