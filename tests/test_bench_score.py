"""`hf-paged bench score`: files, prompts and figures. Nothing here looks at a clock."""

import json

import pytest
from cli_helpers import save_tiny
from typer.testing import CliRunner

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.bench.score import accuracy, read_questions
from hf_paged.integrations.cli import app

ROWS = [
    {"subject": "some_sums", "question": f"What is {i} + 1? ", "choices": [str(i + 1), "a", "b", "c"], "answer": "A"}
    for i in range(6)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_are_mmlus(tmp_path):
    test, dev = write(tmp_path / "test.jsonl", ROWS[:3]), write(tmp_path / "dev.jsonl", ROWS[3:])
    questions = read_questions(test, dev, 2, 1)
    assert len(questions) == 2 and questions[1][1]["answer"] == 0
    assert questions[1][0] == (
        "The following are multiple choice questions (with answers) about some sums.\n\n"
        "What is 3 + 1?\nA. 4\nB. a\nC. b\nD. c\nAnswer: A\n\n"
        "What is 1 + 1?\nA. 2\nB. a\nC. b\nD. c\nAnswer:"
    )
    with pytest.raises(BadInput, match="9 rows were asked for and it holds 3"):
        read_questions(test, None, 9, 1)
    bad = write(tmp_path / "bad.jsonl", [ROWS[0] | {"answer": "E"}])
    with pytest.raises(BadInput, match="answer 'E' of row 1"):
        read_questions(bad, None, 1, 1)
    with pytest.raises(BadInput, match="row 1 has no choices"):
        read_questions(write(tmp_path / "bad.jsonl", [{"question": "?", "answer": 1}]), None, 1, 1)


def test_accuracy_counts_likeliest_answers():
    questions = [("", {"choices": "abcd", "answer": 2}), ("", {"choices": "ab", "answer": 0})]
    assert (
        accuracy(questions, [(-1.0, False)] * 2 + [(-0.5, True), (-2.0, False)] + [(-3.0, False), (-2.0, False)]) == 0.5
    )


def test_the_report(tmp_path):
    pytest.importorskip("lm_eval")
    test, dev = write(tmp_path / "test.jsonl", ROWS[:4]), write(tmp_path / "dev.jsonl", ROWS[4:])
    options = ["--dataset", test, "--shots", dev, "-n", "4", "-m", save_tiny(tmp_path / "model"), "--num-pages", "64"]
    options += ["--repeats", "1", "--batch-sizes", "1,2", "--sample", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", "score", *options, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["accuracy_equal"] and report["largest_difference"] < 1e-3 and not report["greedy_differs"]
    assert report["requests"] == 16 and set(report["seconds_of_batch_sizes"]) == {"1", "2"}
    assert 0 < report["computed_tokens"] < report["cached_tokens"]
    assert CliRunner().invoke(app, ["bench", "score", *options[:-4], "--batch-sizes", "0"]).exit_code == 2
