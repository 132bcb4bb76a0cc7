"""The directory of a run: what a killed run leaves is mended, what belongs to another is refused by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets import OutputDirectory, Shard, read_rows
from hf_paged.integrations.datasets.parts import JsonlPart

MANIFEST = {
    "run": {"model": {"weights": "aa", "dtype": "float32"}, "template": "Q: {q}\nA:", "sampling": {"temperature": 0.0}},
    "about": {"model": "models/one", "dataset": "rows.jsonl"},
}


def row(number: int, error: str | None = None, text: str = "tab\t\n ü∑") -> dict:
    head = {"row": number, "prompt": "p\n", "text": text, "token_ids": [1, number], "finish_reason": "stop"}
    return head | {"prompt_tokens": 2, "truncated": 0, "error": error}


def opened(folder: Path, form: str = "jsonl", rank: int = 0, world: int = 1, shard_rows: int = 3) -> OutputDirectory:
    directory = OutputDirectory(folder, form, shard_rows, Shard(rank, world))
    if rank == 0:
        directory.prepare(MANIFEST)
    directory.open()
    return directory


def written(folder: Path) -> list[dict]:
    return sorted(read_rows(folder), key=lambda row: row["row"])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_come_back_as_they_went_and_are_found_again(tmp_path, form):
    rows = [row(i, error="bad" if i == 3 else None) for i in (4, 1, 3, 0, 900)]
    with opened(tmp_path, form) as directory:
        directory.write(rows[:2])
        directory.write(rows[2:])
    assert list(read_rows(tmp_path)) == rows
    with opened(tmp_path, form) as directory:
        done = directory.done
        assert done.count == 5 and [i for i in range(1000) if done.failed(i)] == [3]
        assert [i for i in range(1000) if i in done] == [0, 1, 3, 4, 900] and 10**9 not in done
        directory.write([row(2)])
    assert written(tmp_path) == sorted([*rows, row(2)], key=lambda row: row["row"])
    assert {p.suffix for p in tmp_path.glob("part-*")} == {f".{form}"}


def test_a_torn_line_is_cut_wherever_it_was_torn(tmp_path):
    with opened(tmp_path) as directory:
        directory.write([row(0), row(1)])
    path = tmp_path / "part-00000.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        with opened(tmp_path) as directory:
            assert directory.done.count == 1
            directory.write([row(1)])
        assert path.read_bytes() == whole


def test_damage_that_no_kill_explains_is_refused(tmp_path):
    with opened(tmp_path) as directory:
        directory.write([row(0), row(1)])
    path = tmp_path / "part-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[5:])
    with pytest.raises(BadInput, match=r"part-00000.jsonl: the line at byte 0 is damaged, and others follow"):
        opened(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(BadInput, match="row 0 is written twice"):
        opened(tmp_path)


def test_a_shard_without_its_name_is_removed(tmp_path):
    with opened(tmp_path, "parquet") as directory:
        directory.write([row(i) for i in range(4)])
    (tmp_path / "part-00000-00002.parquet.tmp").write_bytes(b"half")
    with opened(tmp_path, "parquet") as directory:
        assert directory.done.count == 4
    assert not list(tmp_path.glob("*.tmp"))
    assert [p.name for p in sorted(tmp_path.glob("part*"))] == ["part-00000-00000.parquet", "part-00000-00001.parquet"]


def test_ranks_write_files_of_their_own_and_find_each_others_rows(tmp_path):
    first, second = opened(tmp_path), None
    try:
        second = opened(tmp_path, rank=1, world=2)
        first.write([row(0)])
        second.write([row(1)])
    finally:
        first.close()
        second.close()
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["part-00000.jsonl", "part-00001.jsonl"]
    with opened(tmp_path, rank=0, world=3) as directory:
        assert 0 in directory.done and 1 in directory.done


def test_a_directory_in_use_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(BadInput, match="is in use by another run"):
        opened(tmp_path)
    opened(tmp_path).close()
    with FileLock(tmp_path / ".lock-00007"), pytest.raises(BadInput, match=r"in use by another run \(.lock-00007\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "Q: {q}\nB:"}, r'Changed: template: "Q: \{q\}\\nA:" there, "Q: \{q\}\\nB:" now'),
        ({"sampling": {"temperature": 0.5}}, r"Changed: sampling.temperature: 0.0 there, 0.5 now"),
        ({"sampling": {"temperature": 0.0, "top_k": 3}}, r"Changed: sampling.top_k: null there, 3 now"),
        (
            {"model": {"weights": "bb", "dtype": "float16"}},
            r'model.weights: "aa" there, "bb" now \(models/one there, models/one now\); model.dtype: "float32" there',
        ),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path, change, message):
    opened(tmp_path).close()
    with pytest.raises(BadInput, match=message):
        OutputDirectory(tmp_path).prepare({"run": MANIFEST["run"] | change, "about": MANIFEST["about"]})
    opened(tmp_path).close()


def test_long_texts_are_shown_where_they_part(tmp_path):
    run = MANIFEST["run"] | {"template": "x" * 500 + "one" + "y" * 500}
    OutputDirectory(tmp_path).prepare({"run": run, "about": {}})
    run = run | {"template": "x" * 500 + "two" + "y" * 500}
    with pytest.raises(BadInput, match='template: …"x{20}oney+"… there, …"x{20}twoy+"… now'):
        OutputDirectory(tmp_path, shard=Shard(1, 2)).prepare({"run": run, "about": {}})


def test_other_peoples_files_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match=r"holds rows.jsonl and no manifest.json"):
        opened(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(BadInput, match=r"manifest.json: is no manifest of a run"):
        opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be used for output"):
        opened(tmp_path / "file")
    for bad in ({"form": "xml"}, {"shard_rows": 0}):
        with pytest.raises(BadInput, match=f"={next(iter(bad.values()))!r}"):
            OutputDirectory(tmp_path, **bad)
    with pytest.raises(BadInput, match="holds no run"):
        list(read_rows(tmp_path / "nothing"))


class FullDisk:
    """A file on a disk that has room for so many bytes, and takes a few at a time."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.file.write(data[: min(self.room, 7)])
        self.room -= count
        return count

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_named_and_what_was_written_stays_valid(tmp_path):
    line = len(json.dumps(row(0), ensure_ascii=False).encode()) + 1
    for room in (0, 1, line, line + 5, 2 * line - 1):
        folder = tmp_path / str(room)
        directory = opened(folder)
        directory.write([row(0)])
        directory._part._file = FullDisk(directory._part._file, room)
        with pytest.raises(OSError, match="the disk is full: .* keeps all rows written so far") as error, directory:
            directory.write([row(1), row(2)])
        assert error.value.errno == errno.ENOSPC
        assert written(folder) == [row(0)]
        with opened(folder) as directory:
            directory.write([row(1), row(2)])
        assert written(folder) == [row(0), row(1), row(2)]


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    directory = opened(tmp_path, "parquet")
    directory.write([row(i) for i in range(3)])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"), directory:
        directory.write([row(i) for i in range(3, 6)])
    monkeypatch.undo()
    assert written(tmp_path) == [row(i) for i in range(3)]
    assert [p.name for p in tmp_path.glob("part*")] == ["part-00000-00000.parquet"]


def test_text_that_is_no_unicode_is_written_and_read(tmp_path):
    part = JsonlPart(tmp_path, 0)
    part.write([row(0, text="\ud800")])
    part.close()
    assert json.loads((tmp_path / "part-00000.jsonl").read_text())["text"] == "\ud800"
    with opened(tmp_path / "p", "parquet") as directory:
        directory.write([row(0, text="\ud800")])
    assert written(tmp_path / "p")[0]["text"] == "?"
