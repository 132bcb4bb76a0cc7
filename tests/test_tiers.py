"""Tiers of evicted pages: what goes in comes out, nothing else does, and no fault of a disk is more than a miss."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from pathlib import Path

import pytest
import torch

import hf_paged.kv_files as kv_files
from hf_paged.store import KVStore, LayerShape
from hf_paged.tier_disk import LEFT_BEHIND, DiskTier
from hf_paged.tier_host import HostTier
from hf_paged.tiers import PATIENCE, Speed, Tier

LAYERS = [LayerShape(2, 8, 8), LayerShape(1, 4, 6), LayerShape(3, 2, 2)]
SIZE = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOTS = 1 << 30


def make_store(dtype: torch.dtype = torch.float32, layers: list[LayerShape] = LAYERS, pages: int = 12) -> KVStore:
    """A store whose pages all hold different random numbers."""
    store = KVStore(layers, pages, SIZE, dtype)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*store.keys, *store.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return store


def kv_of(store: KVStore, page: int) -> list[torch.Tensor]:
    return [tensor[page].clone() for tensor in (*store.keys, *store.values)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def path_of(pages: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=pages * SIZE)


def put_path(tier: Tier, tokens: list[int], salt: str | None, pages: list[int]) -> None:
    """As an eviction does: the last page first."""
    for index in reversed(range(len(pages))):
        assert tier.put(tokens[: (index + 1) * SIZE], salt, pages[index])


def disk(store: KVStore, folder: Path, max_bytes: int = LOTS, identity: str = "weights", **settings) -> DiskTier:
    return DiskTier(store, folder, max_bytes, identity, **settings)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("kv-*.safetensors"))


@pytest.fixture(params=["host", "disk"])
def make_tier(request, tmp_path):
    """Makes a tier of either kind that holds a number of pages."""

    def make(store: KVStore, pages: int = 100) -> Tier:
        if request.param == "host":
            return HostTier(store, pages * store.bytes_per_page)
        probe = disk(store, tmp_path / "probe")
        probe.put(path_of(1), None, 1)
        # A file of a longer path is larger; half a page covers that of the few pages here.
        return disk(store, tmp_path / "tier", pages * probe.bytes + probe.bytes // 2)

    return make


# -- both kinds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1]], ids=["several", "one"])
def test_what_goes_in_comes_out(make_tier, dtype, layers):
    store = make_store(dtype, layers)
    tier, tokens = make_tier(store), path_of(3)
    before = [kv_of(store, page) for page in range(13)]
    put_path(tier, tokens, None, [1, 2, 3])
    store.scrub([1, 2, 3])
    assert tier.count(tokens, None, 0) == 3 and tier.count(tokens, None, 2) == 1
    assert tier.count([*tokens, 7], None, 0) == 3 and tier.count(tokens[:-1], None, 0) == 2
    assert tier.fetch(tokens, None, 1, [9, 5]) == 2
    assert same(kv_of(store, 9), before[2]) and same(kv_of(store, 5), before[3])
    for page in (0, 4, 6, 7, 8, 10, 11, 12):
        assert same(kv_of(store, page), before[page]), "another page was written"
    assert (tier.pages, tier.puts, tier.hits, tier.evictions) == (3, 3, 2, 0)
    assert tier.speed.seconds_per_page > 0


def test_special_numbers_keep_their_bits(make_tier):
    store = make_store(torch.bfloat16)
    store.keys[0][1, 0, 0, :4] = torch.tensor([-0.0, 1e-40, 3.3895e38, -1e-38], dtype=torch.bfloat16)
    tier = make_tier(store)
    tier.put(path_of(1), None, 1)
    tier.fetch(path_of(1), None, 0, [2])
    assert torch.equal(store.keys[0][1].view(torch.int16), store.keys[0][2].view(torch.int16))


def test_nothing_is_found_across_salts(make_tier):
    store = make_store()
    tier, tokens = make_tier(store), path_of(2)
    salts = [None, "", "None", "null", "a", "b", "ä\ud800"]
    for page, salt in enumerate(salts, 1):
        assert tier.count(tokens, salt, 0) == 0
        assert tier.fetch(tokens, salt, 0, [12]) == 0
        put_path(tier, tokens[:SIZE], salt, [page])
    for page, salt in enumerate(salts, 1):
        assert tier.fetch(tokens, salt, 0, [12, 11]) == 1
        assert same(kv_of(store, 12), kv_of(store, page))


def test_a_page_is_found_only_behind_its_own_path(make_tier):
    tier, tokens = make_tier(make_store()), path_of(3)
    tier.put(tokens, None, 1)  # its ancestors are elsewhere
    assert tier.count(tokens, None, 0) == 0 and tier.count(tokens, None, 2) == 1
    other = [tokens[0] + 1, *tokens[1:]]
    assert tier.count(other, None, 2) == 0 and tier.fetch(other, None, 2, [3]) == 0
    assert tier.count(tokens, None, 3) == tier.count(tokens, None, 7) == 0


def test_a_gap_ends_a_fetch(make_tier):
    tier, tokens = make_tier(make_store()), path_of(4)
    for index in (0, 1, 3):
        tier.put(tokens[: (index + 1) * SIZE], None, index + 1)
    assert tier.count(tokens, None, 0) == 2 and tier.count(tokens, None, 3) == 1
    assert tier.fetch(tokens, None, 0, [5, 6, 7, 8]) == 2
    assert tier.fetch(tokens, None, 0, []) == 0


def test_large_fetches_are_copied_in_groups(make_tier, monkeypatch):
    store = make_store()
    monkeypatch.setattr("hf_paged.tiers.STAGE_BYTES", 2 * store.bytes_per_page)
    tier, tokens = make_tier(store), path_of(5)
    before = [kv_of(store, page) for page in range(1, 6)]
    put_path(tier, tokens, None, [1, 2, 3, 4, 5])
    for pages in ([6, 7, 8, 9], [8, 9, 10, 11, 12]):
        assert tier.fetch(tokens, None, 0, pages) == len(pages)
        assert all(same(kv_of(store, page), kv) for page, kv in zip(pages, before, strict=False))


def test_the_least_recently_used_pages_go(make_tier):
    store = make_store()
    tier, paths = make_tier(store, pages=3), [path_of(1, seed) for seed in range(5)]
    for page, tokens in enumerate(paths[:3], 1):
        tier.put(tokens, None, page)
    tier.fetch(paths[0], None, 0, [9])
    tier.put(paths[1], None, 2)  # known: a use
    tier.put(paths[3], None, 4)
    assert [tier.count(tokens, None, 0) for tokens in paths] == [1, 1, 0, 1, 0]
    tier.put(paths[4], None, 5)
    assert [tier.count(tokens, None, 0) for tokens in paths] == [0, 1, 0, 1, 1]
    assert (tier.pages, tier.puts, tier.evictions) == (3, 5, 2)
    assert tier.bytes <= tier.max_bytes


def test_of_a_path_the_last_page_goes_first(make_tier):
    tier, tokens = make_tier(make_store(), pages=3), path_of(3)
    put_path(tier, tokens, None, [1, 2, 3])
    tier.fetch(tokens, None, 0, [4, 5, 6])
    tier.put(path_of(1, seed=9), None, 7)
    assert tier.count(tokens, None, 0) == 2


def test_clear_forgets_all(make_tier):
    tier, tokens = make_tier(make_store()), path_of(2)
    put_path(tier, tokens, None, [1, 2])
    tier.clear("other weights")
    assert tier.count(tokens, None, 0) == tier.fetch(tokens, None, 0, [3]) == tier.pages == tier.bytes == 0
    put_path(tier, tokens, None, [3, 4])
    assert tier.count(tokens, None, 0) == 2


def test_settings_that_are_refused(tmp_path):
    store = make_store()
    for wrong in (0, -1, store.bytes_per_page - 1, 1e9, True, None):
        with pytest.raises(ValueError, match="max_bytes"):
            HostTier(store, wrong)
        with pytest.raises(ValueError, match="max_bytes"):
            disk(store, tmp_path, wrong)
    for wrong in ("", None, 3):
        with pytest.raises(ValueError, match="identity"):
            disk(store, tmp_path, identity=wrong)
    with pytest.raises(ValueError, match="salt"):
        disk(store, tmp_path).put(path_of(1), 3, 1)
    with pytest.raises(ValueError, match="int32"):
        disk(store, tmp_path).put([1, 2, 3, 1 << 31], None, 1)


def test_paths_that_do_not_end_with_a_page_are_refused(make_tier):
    tier = make_tier(make_store())
    for wrong in ([], [1], path_of(2)[:-1]):
        with pytest.raises(ValueError, match="multiple of 4"):
            tier.put(wrong, None, 1)


@pytest.mark.parametrize("seed", range(6))
def test_beside_a_dict(make_tier, seed):
    """Against token tuples and page numbers in a dict, over a vocabulary of two; pages go by least recent use."""
    chance, room, store = random.Random(seed), 6, make_store(pages=20)
    tier, known = make_tier(store, room), {}  # known: in order of use, oldest first
    for _ in range(150):
        salt, tokens = chance.choice([None, "a"]), tuple(chance.choices([0, 1], k=SIZE * 3))
        path = [(salt, tokens[: (i + 1) * SIZE]) for i in range(3)]
        first, page = chance.randrange(3), chance.randrange(1, 15)
        here = next((i for i in range(first, 3) if path[i] not in known), 3) - first
        assert tier.count(tokens, salt, first) == here
        if chance.random() < 0.5:
            assert tier.fetch(tokens, salt, first, list(range(16, 19 - first))) == here
            for i in range(here):
                assert same(kv_of(store, 16 + i), kv_of(store, known[path[first + i]]))
            for each in reversed(path[first : first + here]):
                known[each] = known.pop(each)
        else:
            assert tier.put(path[first][1], salt, page)
            known[path[first]] = known.pop(path[first], page)
        if isinstance(tier, DiskTier):  # the limit is one of bytes, and longer paths are longer files
            here = [bool(tier.count(each[1], each[0], len(each[1]) // SIZE - 1)) for each in known]
            assert here == sorted(here), "those used least recently go first"
            known = {each: known[each] for each, stays in zip(list(known), here, strict=True) if stays}
        while len(known) > room:
            del known[next(iter(known))]
        assert tier.pages == len(known) and tier.bytes <= tier.max_bytes
        if isinstance(tier, HostTier):
            tier.check()


# -- host memory


def test_memory_is_taken_as_it_is_needed(monkeypatch):
    store = make_store()
    monkeypatch.setattr("hf_paged.tier_host.CHUNK_BYTES", 3 * store.bytes_per_page)
    tier, slots = HostTier(store, 7 * store.bytes_per_page), []
    for seed in range(9):
        assert tier.put(path_of(1, seed), None, 1 + seed)
        slots.append(len(tier._rows_of_slots))
    assert slots == [3, 3, 3, 6, 6, 6, 7, 7, 7] and tier.evictions == 2
    tier.check()


def test_memory_that_is_refused_is_done_without(monkeypatch, caplog):
    store = make_store()
    monkeypatch.setattr("hf_paged.tier_host.CHUNK_BYTES", 2 * store.bytes_per_page)
    tier = HostTier(store, 8 * store.bytes_per_page)
    tier.put(path_of(1, 0), None, 1)

    def refuse(*args, **settings):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        assert tier.put(path_of(1, 1), None, 2) and tier.put(path_of(1, 2), None, 3)
    assert tier.put(path_of(1, 3), None, 4)
    assert tier.pages == 2 and tier.count(path_of(1, 0), None, 0) == 0
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    tier.check()


def test_a_copy_that_fails_changes_nothing():
    tier = HostTier(make_store(), LOTS)
    tier.put(path_of(1), None, 1)
    with pytest.raises(IndexError):
        tier.put(path_of(2), None, 99)
    assert tier.pages == 1
    tier.check()


def test_nothing_is_left_of_salts_and_paths_that_went():
    store = make_store()
    tier = HostTier(store, store.bytes_per_page)
    for seed in range(20):
        tier.put(path_of(3, seed), f"tenant {seed}", 1)
        tier.check()
    assert len(tier._roots) == 1


def test_inference_mode_makes_no_difference():
    store = make_store()
    tier = HostTier(store, LOTS)
    with torch.inference_mode():
        tier.put(path_of(1), None, 1)
    tier.put(path_of(1, 1), None, 2)
    with torch.inference_mode():
        assert tier.fetch(path_of(1), None, 0, [3]) == 1
    assert tier.fetch(path_of(1, 1), None, 0, [4]) == 1
    assert same(kv_of(store, 1), kv_of(store, 3)) and same(kv_of(store, 2), kv_of(store, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_of_a_cuda_device_come_back(make_tier, dtype):
    store = KVStore(LAYERS, 64, SIZE, dtype, "cuda")
    for tensor in (*store.keys, *store.values):
        tensor.normal_()
    before, tokens, pages = [kv_of(store, page) for page in range(65)], path_of(30), list(range(1, 31))
    tier = make_tier(store)
    put_path(tier, tokens, None, pages)
    store.scrub(pages)
    assert tier.fetch(tokens, None, 0, [64 - page for page in pages]) == 30
    assert all(same(kv_of(store, 64 - page), before[page]) for page in pages)
    if isinstance(tier, HostTier):
        assert all(row.is_pinned() for row in tier._rows_of_slots) and len(tier._rows_of_slots) <= 100
        tier.check()


# -- a directory


def test_another_process_finds_what_was_written(tmp_path):
    store, tokens = make_store(torch.bfloat16), path_of(3)
    put_path(disk(store, tmp_path), tokens, "a", [1, 2, 3])
    other = disk(make_store(torch.bfloat16), tmp_path)
    assert other.pages == 3 and other.bytes == sum(f.stat().st_size for f in files_of(tmp_path))
    other.store.scrub(list(range(13)))
    assert other.count(tokens, None, 0) == 0 and other.fetch(tokens, "a", 0, [4, 5, 6]) == 3
    assert all(same(kv_of(other.store, 3 + page), kv_of(store, page)) for page in (1, 2, 3))


def test_files_written_later_are_found_by_name(tmp_path):
    store, tokens = make_store(), path_of(2)
    blind, seeing, writer = disk(store, tmp_path), disk(store, tmp_path, look=True), disk(store, tmp_path)
    put_path(writer, tokens, None, [1, 2])
    assert blind.count(tokens, None, 0) == 0 and seeing.count(tokens, None, 0) == 2
    assert seeing.fetch(tokens, None, 0, [3, 4]) == 2
    blind.refresh()
    assert blind.count(tokens, None, 0) == 2
    late = disk(store, tmp_path)
    late.clear("weights")
    assert late.put(tokens, None, 1) and late.puts == 0, "what is there is not written again"


def test_a_file_that_vanishes_is_a_miss(tmp_path, caplog):
    tier, tokens = disk(make_store(), tmp_path), path_of(3)
    put_path(tier, tokens, None, [1, 2, 3])
    names = [each.name for each in tier._names(tokens, None, 0)]
    (tmp_path / names[1]).unlink()
    assert tier.fetch(tokens, None, 0, [4, 5, 6]) == 1
    assert tier.count(tokens, None, 0) == 1 and tier.pages == 2 and not caplog.records
    assert tier.put(tokens[: 2 * SIZE], None, 2) and tier.fetch(tokens, None, 0, [4, 5, 6]) == 3


def test_other_identities_and_layouts_are_left_alone(tmp_path):
    store, tokens = make_store(), path_of(1)
    put_path(disk(store, tmp_path), tokens, None, [1])
    others = [
        disk(store, tmp_path, identity="other"),
        disk(make_store(torch.float16), tmp_path),
        disk(make_store(layers=LAYERS[::-1]), tmp_path),
    ]
    for other in others:
        assert other.pages == other.bytes == other.count(tokens, None, 0) == 0
        assert other.put(tokens, None, 2)
    assert len(files_of(tmp_path)) == 4


def test_files_under_a_name_that_is_not_theirs_are_misses(tmp_path, caplog):
    """As if digests collided: what a file says of itself is compared."""
    store, tokens = make_store(), path_of(1)
    tier = disk(store, tmp_path)
    for other, salt, identity in ((path_of(1, 1), None, "weights"), (tokens, "a", "weights"), (tokens, None, "other")):
        writer = disk(store, tmp_path / "elsewhere", identity=identity)
        writer.put(other, salt, 1)
        os.replace(tmp_path / "elsewhere" / writer._names(other, salt, 0)[0].name, target(tier, tokens))
        tier.refresh()
        assert tier.count(tokens, None, 0) == 1 and tier.fetch(tokens, None, 0, [5]) == 0
        assert tier.put(tokens, None, 1) and tier.fetch(tokens, None, 0, [5]) == 1
        tier.refresh()
        assert tier.count(tokens, None, 0) == 1, "its name is good again"
        tier.clear("weights")
    assert len(caplog.records) == 1


def target(tier: DiskTier, tokens: list[int]) -> Path:
    return tier.folder / tier._names(tokens, None, len(tokens) // SIZE - 1)[0].name


def test_truncated_files_are_misses(tmp_path, caplog):
    store, tokens = make_store(), path_of(2)
    tier = disk(store, tmp_path)
    put_path(tier, tokens, None, [1, 2])
    file = target(tier, tokens)
    whole, before = file.read_bytes(), kv_of(store, 6)
    for length in [*range(0, 20), *range(20, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        tier.refresh()
        assert tier.count(tokens, None, 0) == 2 and tier.fetch(tokens, None, 0, [5, 6]) == 1
        assert tier.count(tokens, None, 0) == 1 and not file.exists() and same(kv_of(store, 6), before)
        tier._bad.clear()
    assert tier.bytes == sum(f.stat().st_size for f in files_of(tmp_path))
    assert [r.name for r in caplog.records] == ["hf_paged"] and tier.damaged > 20
    file.write_bytes(whole + b"\0")
    tier.refresh()
    assert tier.fetch(tokens, None, 0, [5, 6]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flipped_bits_are_noticed(tmp_path, dtype):
    store, tokens = make_store(dtype), path_of(1)
    tier, chance = disk(store, tmp_path), random.Random(0)
    tier.put(tokens, None, 1)
    file = target(tier, tokens)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(0, header, 3), *range(header, len(whole), 11)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        tier.refresh()
        if tier.fetch(tokens, None, 0, [5]):
            # A flip in the header may leave its meaning as it was: a letter of a name nobody reads, or white space.
            assert at < header and same(kv_of(store, 5), kv_of(store, 1))
        tier._bad.clear()


def test_numbers_that_are_not_finite_are_not_taken(tmp_path):
    store, tokens = make_store(), path_of(1)
    tier = disk(store, tmp_path)
    store.values[1][1, 0, 0, 0] = float("nan")
    tier.put(tokens, None, 1)
    assert tier.fetch(tokens, None, 0, [5]) == 0 and store.finite([5])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("when", ["open", "write", "replace"])
def test_a_folder_that_takes_no_more_is_still_read(tmp_path, monkeypatch, caplog, number, when):
    store, tokens = make_store(), path_of(3)
    tier = disk(store, tmp_path)
    tier.put(tokens[:SIZE], None, 1)
    with monkeypatch.context() as patch:
        fail_at(patch, when, number)
        assert not tier.put(tokens[: 2 * SIZE], None, 2) and not tier.put(tokens, None, 3)
        assert os.strerror(number) in tier.stopped
        assert tier.fetch(tokens, None, 0, [5, 6]) == 1 and same(kv_of(store, 5), kv_of(store, 1))
        assert tier.put(tokens[:SIZE], None, 1), "it is there"
    assert not tier.put(tokens, None, 3)
    assert [os.strerror(number) in r.getMessage() for r in caplog.records] == [True]
    assert [f.name for f in tmp_path.iterdir()] == [target(tier, tokens[:SIZE]).name], "a file was left behind"


def fail_at(patch: pytest.MonkeyPatch, when: str, number: int) -> None:
    """Writing a file of KV fails there."""

    def fail(*args, **settings):
        raise OSError(number, os.strerror(number))

    def fail_to_write(path, mode="r", **settings):
        if "r" in mode:
            return open(path, mode, **settings)
        if when == "open":
            fail()
        file = open(path, mode, buffering=0, **settings)  # noqa: SIM115
        return Half(file, fail)

    if when == "replace":
        patch.setattr(os, "replace", fail)
    else:
        patch.setattr(kv_files, "open", fail_to_write, raising=False)


class Half:
    """A file on a disk with too little room."""

    def __init__(self, file, fail) -> None:
        self.file, self.fail = file, fail

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.fail()


def test_a_folder_that_cannot_be_made_is_warned_of(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tier = disk(make_store(), tmp_path / "file")
    assert tier.stopped and len(caplog.records) == 1
    assert not tier.put(path_of(1), None, 1)
    assert tier.count(path_of(1), None, 0) == tier.fetch(path_of(1), None, 0, [1]) == 0


def test_a_folder_that_goes_away_is_a_miss(tmp_path):
    tier = disk(make_store(), tmp_path / "tier")
    tier.put(path_of(1), None, 1)
    for file in (tmp_path / "tier").iterdir():
        file.unlink()
    (tmp_path / "tier").rmdir()
    assert tier.fetch(path_of(1), None, 0, [2]) == 0
    assert not tier.put(path_of(1), None, 1) and tier.stopped
    tier.refresh()
    assert tier.pages == 0


def test_without_an_identity_it_rests(tmp_path):
    tier, tokens = disk(make_store(), tmp_path, look=True), path_of(1)
    tier.put(tokens, None, 1)
    tier.clear()
    assert not tier.put(tokens, None, 1) and tier.count(tokens, None, 0) == tier.fetch(tokens, None, 0, [2]) == 0
    tier.clear("weights")
    assert tier.fetch(tokens, None, 0, [2]) == 1


def test_the_oldest_files_go_whoever_wrote_them(tmp_path):
    store, paths = make_store(), [path_of(1, seed) for seed in range(5)]
    first = disk(store, tmp_path)
    for age, tokens in enumerate(paths[:3]):
        first.put(tokens, None, 1)
        os.utime(target(first, tokens), (1000 - age, 1000 - age))
    second = disk(store, tmp_path, first.bytes)
    second.put(paths[3], None, 1)
    assert [target(first, tokens).exists() for tokens in paths] == [True, True, False, True, False]
    first.fetch(paths[1], None, 0, [2])  # a use that others see
    second.refresh()
    second.put(paths[4], None, 1)
    assert [target(first, tokens).exists() for tokens in paths] == [False, True, False, True, True]
    assert second.evictions == 2


def test_what_others_write_counts_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_paged.tier_disk.RESCAN", 4)
    store = make_store()
    one = disk(store, tmp_path)
    one.put(path_of(1, 999), None, 1)
    limit = 10 * one.bytes
    a, b = disk(store, tmp_path, limit), disk(store, tmp_path, limit)
    for seed in range(60):
        (a if seed % 2 else b).put(path_of(1, seed), None, 1)
        assert sum(f.stat().st_size for f in files_of(tmp_path)) <= limit + 4 * one.bytes
    assert a.stopped is b.stopped is None


def test_unfinished_files_of_dead_processes_are_removed(tmp_path):
    tier = disk(make_store(), tmp_path)
    old, new, foreign = (tmp_path / f"{name}.tmp" for name in (f"{tier._prefix}a", f"{tier._prefix}b", "c"))
    for file in (old, new, foreign):
        file.write_bytes(b"half")
        os.utime(file, (1, 1) if file != new else None)
    tier.refresh()
    assert [file.exists() for file in (old, new, foreign)] == [False, True, True] and LEFT_BEHIND > 60
    assert tier.pages == 0


def test_things_that_are_no_files_are_passed_over(tmp_path):
    tier, tokens = disk(make_store(), tmp_path, look=True), path_of(1)
    target(tier, tokens).mkdir()
    tier.refresh()
    assert tier.count(tokens, None, 0) == 0
    assert not tier.put(tokens, None, 1) and tier.stopped


def test_two_processes_write_and_remove_at_once(tmp_path, caplog):
    """Four tiers over one folder, with little room, on the same paths: whatever comes back is right."""
    paths, errors = [path_of(2, seed) for seed in range(6)], []
    probe = disk(make_store(), tmp_path / "probe")
    probe.put(paths[0], None, 1)

    def work(seed: int) -> None:
        chance, store = random.Random(seed), make_store()
        tier = disk(store, tmp_path / "tier", 5 * probe.bytes, look=bool(seed % 2))
        try:
            for _ in range(60):
                which = chance.randrange(6)
                index = chance.randrange(2)
                assert tier.put(paths[which][: (index + 1) * SIZE], None, 1 + which)
                which = chance.randrange(6)
                done = tier.fetch(paths[which], None, 0, [10, 11])
                assert all(same(kv_of(store, page), kv_of(store, 1 + which)) for page in [10, 11][:done])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not list((tmp_path / "tier").glob("*.tmp"))


# -- whether it pays


def test_loading_is_tried_first_and_while_it_is_faster():
    speed = Speed(page_size=16)
    assert not speed.worth(0, 1000.0)
    assert speed.worth(3, 1000.0)
    speed.note(0, 1.0)
    assert speed.seconds_per_page is None
    speed.note(10, 0.1)  # 1600 tokens a second
    assert speed.worth(1, 1000.0) and not speed.worth(1, 2000.0)
    assert speed.worth(1, None) and speed.worth(1, 0)


def test_the_average_follows_what_is_measured():
    speed = Speed(page_size=16)
    speed.note(1, 1.0)
    for _ in range(40):
        speed.note(4, 0.004)
    assert speed.seconds_per_page == pytest.approx(0.001, rel=0.02)


def test_a_slow_tier_is_tried_again_and_ever_later():
    speed = Speed(page_size=16)
    speed.note(1, 1.0)
    waits, refused = [], 0
    while len(waits) < 4:
        if speed.worth(8, 1000.0):
            waits.append(refused)
            refused = 0
        else:
            refused += 8
    assert waits == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE, 8 * PATIENCE]
