"""Datasets of every kind give the same numbered rows; what is no row is told, and fails nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets import open_source
from hf_paged.integrations.datasets.readers import BadRow

ROWS = [{"question": f"What is {i}?", "answer": str(i * i)} for i in range(600)]


def write_jsonl(path: Path, rows=ROWS) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path) -> Path:
    text = "question,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in ROWS)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def kinds(folder: Path) -> dict:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return {
        "jsonl": write_jsonl(folder / "rows.jsonl"),
        "jsonl.gz": str(write_jsonl(folder / "rows.jsonl.gz")),
        "csv": write_csv(folder / "rows.csv"),
        "csv.gz": write_csv(folder / "rows.csv.gz"),
        "parquet": folder / "rows.parquet",
        "files": [write_jsonl(folder / "a.jsonl", ROWS[:250]), write_jsonl(folder / "b.jsonl.gz", ROWS[250:])],
        "folder": folder / "saved",
        "Dataset": datasets.Dataset.from_list(ROWS),
        "IterableDataset": datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        "DatasetDict": datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)),
        "list": ROWS,
        "generator": (row for row in ROWS),
    }


def test_all_kinds_give_the_same_rows_with_their_numbers(tmp_path):
    wanted = {0, 1, 31, 32, 255, 256, 599}
    for kind, dataset in kinds(tmp_path).items():
        source = open_source(dataset)
        found = dict(source.rows(wanted.__contains__))
        assert found == {i: ROWS[i] for i in wanted}, kind
        assert source.total in (600, None), kind
        assert source.total == 600 or kind in ("IterableDataset", "generator")


def test_a_limit_ends_every_kind(tmp_path):
    for kind, dataset in kinds(tmp_path).items():
        source = open_source(dataset, limit=40)
        assert [number for number, _ in source.rows()] == list(range(40)), kind
        assert source.total == 40


def test_fingerprints_tell_datasets_apart_and_stay_the_same(tmp_path):
    (tmp_path / "other").mkdir()
    for (kind, one), again in zip(kinds(tmp_path).items(), kinds(tmp_path).values(), strict=True):
        assert open_source(one).fingerprint == open_source(again).fingerprint, kind
    changed = [ROWS[0] | {"answer": "?"}, *ROWS[1:]]
    assert open_source(ROWS).fingerprint != open_source(changed).fingerprint
    first = open_source(write_jsonl(tmp_path / "rows.jsonl")).fingerprint
    assert first != open_source(write_jsonl(tmp_path / "rows.jsonl", changed)).fingerprint


def test_what_is_no_row_comes_as_such_and_the_others_come_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n[1, 2]\n\n{"a": \n{"a": 4}\n')
    rows = dict(open_source(path).rows())
    assert rows[0] == {"a": 1} and rows[3] == {"a": 4}
    assert rows[1] == BadRow("line 2 is no JSON object but a list")
    assert rows[2].reason.startswith("line 4 is not JSON")
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n3\n4,5,6\n")
    rows = dict(open_source(path).rows())
    assert rows[0] == {"a": "1", "b": "2"}
    assert "column 'b'" in rows[1].reason and "1 fields more" in rows[2].reason
    assert dict(open_source([{"a": 1}, "text"]).rows())[1].reason == "the row is no mapping of columns but a str"


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("nowhere.jsonl", {}, "no such file: nowhere.jsonl"),
        ("./nowhere", {}, "no such file"),
        (3, {}, "dataset is a int"),
        ([{"a": 1}], {"split": "test"}, "split=test: the dataset has no splits"),
        ([{"a": 1}], {"limit": -1}, "limit=-1"),
        ({"train": [], "test": []}, {}, "several splits: say which of train, test"),
        ({"train": [], "test": []}, {"split": "dev"}, "no split 'dev': choose of train, test"),
    ],
)
def test_what_cannot_be_opened_is_named(dataset, options, message):
    with pytest.raises(BadInput, match=message):
        list(open_source(dataset, **options).rows())


def test_a_file_that_breaks_off_is_named(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(BadInput, match=r"rows.jsonl.gz: cannot be read"):
        list(open_source(tmp_path / "rows.jsonl.gz").rows())
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"rows.parquet: cannot be read"):
        open_source(tmp_path / "rows.parquet")


def test_a_hub_name_is_loaded_as_a_stream(monkeypatch):
    asked = []

    def load(name, subset, streaming):
        asked.append((name, subset, streaming))
        return datasets.IterableDatasetDict(test=datasets.Dataset.from_list(ROWS).to_iterable_dataset())

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(open_source("openai/gsm8k", subset="main", split="test").rows())) == 600
    assert asked == [("openai/gsm8k", "main", True)]
    with pytest.raises(BadInput, match="no split 'train': choose of test"):
        open_source("openai/gsm8k", split="train")
