"""`hf-paged score`: rows in, log-likelihoods and choices out; a bad row is the only one that fails."""

import json

import pytest
from cli_helpers import save_tiny
from typer.testing import CliRunner

from hf_paged.integrations.cli import app

ROWS = [{"question": f"What is {i} + 1?", "choices": [str(i + 1), "a dog"], "answer": "AB"[i % 2]} for i in range(5)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def score(tmp_path, tiny, rows, *options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["score", "--dataset", str(path), "-m", tiny, "--num-pages", "64", "--device", "cpu", *options]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out.jsonl")])
    lines = (tmp_path / "out.jsonl").read_text().splitlines() if result.exit_code == 0 else []
    return result, [json.loads(line) for line in lines]


def test_rows_are_scored_in_order(tmp_path, tiny):
    result, made = score(tmp_path, tiny, ROWS, "--answer", "answer")
    assert result.exit_code == 0, result.output
    assert [row["row"] for row in made] == list(range(5)) and all(row["error"] is None for row in made)
    for number, row in enumerate(made):
        assert row["choice"] == max((0, 1), key=row["logprobs"].__getitem__)
        assert row["correct"] == (row["choice"] == number % 2)
        assert [len(row[name]) for name in ("tokens", "greedy")] == [2, 2]
    _, mean = score(tmp_path, tiny, ROWS, "--by", "mean")
    assert all(a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-3) for a, b in zip(made, mean, strict=True))
    assert all("correct" not in row for row in mean)


def test_a_bad_row_fails_alone(tmp_path, tiny):
    bad = [ROWS[0], {"question": "?"}, ROWS[1] | {"choices": "no list"}, ROWS[2] | {"question": "far " * 300}, ROWS[3]]
    result, made = score(tmp_path, tiny, bad)
    assert result.exit_code == 0, result.output
    assert [row["error"] is None for row in made] == [True, False, False, False, True]
    assert "choices" in made[1]["error"] and "no list" in made[2]["error"] and "allows 256" in made[3]["error"]
    _, made = score(tmp_path, tiny, bad, "--truncate")
    assert made[3]["error"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--template", "{nope}"), "nope"),
        (("--options", "question"), "list of texts"),
        (("--answer", "question"), "none of"),
        (("--by", "max"), "sum or mean"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(tmp_path, tiny, options, words):
    result, _ = score(tmp_path, tiny, ROWS, *options)
    assert result.exit_code == 2 and words in result.output
    assert not (tmp_path / "out.jsonl").exists()
