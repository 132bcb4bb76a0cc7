"""`hf-paged`: what it prints, its exit codes, and that a user's mistake never ends in a traceback."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import save_tiny
from typer.testing import CliRunner

from hf_paged.integrations.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def run(*args: str, stdin: str | None = None):
    return runner.invoke(app, [str(arg) for arg in args], input=stdin)


def lines(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_generate_answers_arguments_in_their_order(tiny):
    rows = lines(run("generate", "-m", tiny, "--json", "--max-tokens", 5, "--ignore-eos", "one", "two three"))
    assert [row["prompt"] for row in rows] == ["one", "two three"]
    assert [len(row["outputs"][0]["token_ids"]) for row in rows] == [5, 5]
    assert all(row["error"] is None and row["outputs"][0]["finish_reason"] == "length" for row in rows)


def test_generate_gives_the_same_from_stdin_a_file_and_arguments(tiny, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo three\n")
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as out:
        out.write('{"text": "one"}\n{"text": "two three"}\n')
    common = ("generate", "-m", tiny, "--json", "--max-tokens", "5")
    answers = [
        [row["outputs"] for row in lines(result)]
        for result in (
            run(*common, "one", "two three"),
            run(*common, stdin="one\ntwo three\n"),
            run(*common, "--file", tmp_path / "p.txt"),
            run(*common, "--file", tmp_path / "p.jsonl.gz", "--field", "text"),
        )
    ]
    assert all(answer == answers[0] for answer in answers)


def test_generate_takes_all_of_stdin_as_one_prompt_when_told(tiny):
    rows = lines(run("generate", "-m", tiny, "--json", "--max-tokens", 2, "--whole", stdin="def f():\n    return\n"))
    assert [row["prompt"] for row in rows] == ["def f():\n    return"]


def test_generate_samples_repeatably_with_a_seed(tiny):
    args = ("generate", "-m", tiny, "--json", "--max-tokens", 6, "--temperature", 1, "--n", 2, "--seed", 3, "hi")
    first, second = lines(run(*args, "--logprobs", 2)), lines(run(*args))
    texts = [[output["token_ids"] for output in row[0]["outputs"]] for row in (first, second)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert all(len(best) in (2, 3) for best in first[0]["outputs"][0]["logprobs"])


def test_streaming_prints_what_generate_prints(tiny):
    args = ("generate", "-m", tiny, "--max-tokens", 8, "hello there")
    streamed, whole = run(*args, "--stream"), run(*args, "--no-stream")
    assert streamed.exit_code == whole.exit_code == 0
    assert streamed.stdout == whole.stdout and streamed.stdout.startswith("hello there")


def test_one_prompt_that_fails_leaves_the_others(tiny):
    result = run("generate", "-m", tiny, "--json", "--max-tokens", 3, "hi", "word " * 400)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert rows[0]["error"] is None and len(rows[0]["outputs"][0]["token_ids"]) == 3
    assert "256" in rows[1]["error"] and rows[1]["outputs"] == []


def test_info_tells_versions_backend_and_memory_plan(tiny):
    report = json.loads(run("info", "-m", tiny, "--num-pages", 10, "--page-size", 8, "--json").stdout)
    plan = report["memory_plan"]
    assert report["backend"] == "torch" and report["backend_reason"]
    # 2 layers of K and V, 2 heads of 8 numbers of 4 bytes.
    assert plan["token_bytes"] == 2 * 2 * 2 * 8 * 4
    assert plan["page_bytes"] == 8 * plan["token_bytes"] and plan["limit_bytes"] == 10 * plan["page_bytes"]
    text = run("info", "-m", tiny)
    assert text.exit_code == 0 and "backend" in text.stdout and "LlamaForCausalLM" in text.stdout


def test_demo_compares_three_engines_and_shows_answers(tiny):
    result = run("demo", "-m", tiny, "-n", 3, "--max-output", 6, "--show", 1, "--json")
    report = json.loads(result.stdout)
    assert [row["engine"] for row in report["rows"]] == ["hf", "hf-cb", "hf_paged"]
    assert report["tokens_equal"] and len(report["answers"]) == 1
    assert all(row["tokens"] == 18 for row in report["rows"])


def test_demo_prints_a_table(tiny):
    result = run("demo", "-m", tiny, "-n", 2, "--max-output", 4)
    assert result.exit_code == 0
    for word in ("hf_paged", "tokens/s", "KV waste", "Question:"):
        assert word in result.stdout


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hf_paged", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bench" in done.stdout


MISTAKES = [
    (("generate", "-m", "/no/such/folder", "x"), "/no/such/folder"),
    (("generate", "-m", "{here}", "x"), "config.json"),
    (("generate", "-m", "{tiny}", "--temperature", "-1", "x"), "temperature"),
    (("generate", "-m", "{tiny}", "--top-p", "0", "x"), "top_p"),
    (("generate", "-m", "{tiny}", "--page-size", "999", "x"), "page_size"),
    (("generate", "-m", "{tiny}", "--num-pages", "4", "--memory-fraction", "0.5", "x"), "memory_fraction"),
    (("generate", "-m", "{tiny}", "--dtype", "int9", "x"), "float32"),
    (("generate", "-m", "{tiny}", "--device", "quantum", "x"), "quantum"),
    (("generate", "-m", "{tiny}", "--file", "{here}/none.txt"), "none.txt"),
    (("generate", "-m", "{tiny}", "--file", "{here}/bad.jsonl"), "bad.jsonl"),
    (("generate", "-m", "{tiny}", "--file", "{here}/bad.jsonl", "x"), "not both"),
    (("generate", "-m", "{tiny}", "--chat", "x"), "chat template"),
    (("generate", "-m", "{tiny}"), "no prompt"),
    (("generate", "-m", "{tiny}", "--max-tokens", "many", "x"), "max-tokens"),
    (("bench", "throughput", "-m", "{tiny}", "--peers", "hf,foo"), "foo"),
    (("bench", "throughput", "-m", "{tiny}", "--peers", "vllm"), "--vllm-python"),
    (("bench", "throughput", "-m", "{tiny}", "--peers", "vllm", "--vllm-python", "/no/python"), "/no/python"),
    (("bench", "throughput", "-m", "{tiny}", "--field", "nope"), "question"),
    (("bench", "throughput", "-m", "{tiny}", "--dataset", "{here}/bad.jsonl"), "not JSON"),
    (("bench", "throughput", "-m", "{tiny}", "--template", "no braces"), "{{question}}"),
    (("bench", "throughput", "-m", "{tiny}", "--requests", "100000"), "100000"),
    (("bench", "throughput", "-m", "{tiny}", "--requests", "0"), "requests"),
    (("bench", "throughput", "-m", "{tiny}", "--output-lengths", "0"), "at least 1"),
    (("bench", "throughput", "-m", "{tiny}", "--output-lengths", "250"), "256"),
    (("bench", "throughput", "-m", "{tiny}", "--json", "{here}/no/out.json"), "out.json"),
    (("bench", "latency", "-m", "{tiny}", "--peers", "hf-cb"), "hf-cb"),
    (("info", "-m", "{tiny}", "--backend", "cuda"), "backend"),
    (("nope",), "nope"),
]


@pytest.mark.parametrize(("args", "word"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_users_mistake_is_told_in_a_line_and_exits_with_2(args, word, tiny, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    result = run(*(arg.format(tiny=tiny, here=tmp_path) for arg in args), stdin="")
    assert result.exit_code == 2, result.output
    assert word.format() in result.stderr.replace("\n", "") and "Traceback" not in result.output


def test_a_failure_exits_with_1_and_without_a_traceback(tiny, monkeypatch):
    import hf_paged

    def broken(*args, **settings):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(hf_paged, "Engine", broken, raising=False)
    result = run("generate", "-m", tiny, "x")
    assert result.exit_code == 1 and "the disk is on fire" in result.stderr
    assert "Traceback" not in result.output


def test_without_the_checkout_the_user_is_told_to_name_a_model(monkeypatch):
    from hf_paged.integrations.bench import models

    monkeypatch.setattr(models, "_EXAMPLES", Path("/nowhere"))
    result = run("generate", "x")
    assert result.exit_code == 2 and "--model" in result.stderr
    assert json.loads(run("info", "--json").stdout)["memory_plan"] is None


def test_pictures_that_could_not_be_written_are_refused_at_once(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"hash_ids": [1, 2, n]}) + "\n" for n in range(30)))
    pytest.importorskip("matplotlib")
    for plot, words in ((tmp_path / "none" / "a.png", "--plot"), (tmp_path / "a.docx", "no kind of picture")):
        result = runner.invoke(app, ["bench", "prefix", "--trace", str(trace), "--plot", str(plot)])
        assert result.exit_code == 2 and words in result.output


def test_a_trace_is_read_as_far_as_is_said(tmp_path):
    trace, told = tmp_path / "trace.jsonl", []
    trace.write_text("".join(json.dumps({"hash_ids": [1, 2, n + 3]}) + "\n" for n in range(30)))
    for more in ([], ["-n", "10"]):
        out = tmp_path / "out.json"
        result = runner.invoke(app, ["bench", "prefix", "--trace", str(trace), "--json", str(out), *more])
        assert result.exit_code == 0, result.output
        told.append(json.loads(out.read_text())["trace"]["distinct"])
    assert told == [32, 12]
    trace.write_text('{"hash_ids": [1]}\n{"hash_ids": \n')
    result = runner.invoke(app, ["bench", "prefix", "--trace", str(trace)])
    assert result.exit_code == 2 and "line 2 is not JSON" in " ".join(result.output.split())
