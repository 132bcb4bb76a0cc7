"""`generate_dataset` and `hf-paged eval`: right tokens, every row once, whatever happens on the way."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import BUNDLED, save_tiny
from filelock import FileLock
from typer.testing import CliRunner

from hf_paged import Engine
from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.cli import app
from hf_paged.integrations.datasets import Interrupted, generate_dataset, job, read_rows

WORDS = ("one", "two", "three", "four", "five", "six")
HEADER = "Question: what comes first?\nAnswer: one\n\n"
TEMPLATE = HEADER + "Question: {question}\nAnswer:"
SAMPLED = {"temperature": 0.9, "top_p": 0.95}


def rows_of(count: int) -> list[dict]:
    draw = random.Random(3)
    return [{"question": " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))} for _ in range(count)]


DATA = rows_of(40)


@pytest.fixture
def run(text_model, tokenizer, tmp_path):
    """A short job over `DATA` in a directory; gives its sorted lines."""

    def go(out: str = "out", dataset=DATA, **options) -> list[bytes]:
        options = {"template": TEMPLATE, "max_tokens": 6, "max_sequences": 4, "check": True} | options
        generate_dataset(text_model, dataset, tmp_path / out, tokenizer=tokenizer, **options)
        return lines(tmp_path / out)

    return go


def lines(folder: Path) -> list[bytes]:
    """All lines of a run in the order of their rows."""
    found = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines(True)]
    return sorted(found, key=lambda line: json.loads(line)["row"])


def test_rows_are_those_of_generate_and_prompts_those_of_the_tokenizer(run, text_model, tokenizer):
    rows = [json.loads(line) for line in run()]
    assert [row["row"] for row in rows] == list(range(len(DATA)))
    for row, data in zip(rows, DATA, strict=True):
        assert row["prompt"] == HEADER + f"Question: {data['question']}\nAnswer:"
        batch = tokenizer(row["prompt"], return_tensors="pt")
        tokens = text_model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert row["token_ids"] == tokens.tolist()
        assert row["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert row["prompt_tokens"] == batch["input_ids"].shape[1]
        assert (row["error"], row["truncated"], row["finish_reason"]) == (None, 0, "length")


def test_sampled_rows_depend_on_their_number_and_the_seed_alone(run, tmp_path, text_model):
    plain = run(sampling=SAMPLED, seed=5)
    assert run("window", sampling=SAMPLED, seed=5, window=1, max_sequences=9) == plain
    assert run("draft", sampling=SAMPLED, seed=5, draft_model=text_model) == plain
    for rank in range(3):
        run("ranks", sampling=SAMPLED, seed=5, shard=(rank, 3))
    assert lines(tmp_path / "ranks") == plain
    assert run("limit", sampling=SAMPLED, seed=5, limit=7) == plain[:7]
    assert run("seed", sampling=SAMPLED, seed=6) != plain
    assert len({json.loads(line)["text"] for line in plain}) > 30
    same = run("same", [DATA[0]] * 8, sampling=SAMPLED)
    assert len({json.loads(line)["text"] for line in same}) == 8


def test_parquet_holds_the_same_rows(run, tmp_path):
    plain = [json.loads(line) for line in run()]
    run("parquet", format="parquet", shard_rows=15)
    assert len(list((tmp_path / "parquet").glob("*.parquet"))) == 3
    assert sorted(read_rows(tmp_path / "parquet"), key=lambda row: row["row"]) == plain


def test_a_run_goes_on_where_it_was_with_any_number_of_processes(run, tmp_path):
    plain = run()
    assert run("again", limit=11) == plain[:11]
    for rank in (1, 0):
        run("again", shard=(rank, 2), limit=23)
    assert run("again") == plain
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("again/part*")}
    assert run("again") == plain
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("again/part*")}


def test_rows_that_fail_are_written_and_counted_and_the_others_are_as_ever(run, tmp_path):
    plain = run()
    bad = [*DATA]
    bad[3], bad[9], bad[17] = {"other": 1}, "no row", {"question": " ".join(WORDS * 60)}
    got = run("bad", bad)
    errors = {i: json.loads(line)["error"] for i, line in enumerate(got) if json.loads(line)["error"] is not None}
    assert sorted(errors) == [3, 9, 17]
    assert errors[3] == "no column 'question'" and "no mapping of columns" in errors[9]
    assert "the prompt has 498 tokens: max_model_len allows 256" in errors[17]
    assert [line for i, line in enumerate(got) if i not in errors] == [
        line for i, line in enumerate(plain) if i not in errors
    ]
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert (summary["rows"], summary["failed"], summary["finished"]) == (40, 3, True)
    assert sum(summary["errors"].values()) == 3
    run("bad", bad)
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert (summary["rows"], summary["rows_before"], summary["failed_before"]) == (0, 40, 3)


def test_a_long_prompt_is_cut_where_that_is_asked_for(run, tokenizer, text_model):
    question = " ".join(WORDS * 60)
    row = json.loads(run(dataset=[{"question": question}], too_long="truncate-left")[0])
    ids = tokenizer(row["prompt"])["input_ids"]
    assert row["error"] is None and row["prompt_tokens"] == 250 and row["truncated"] == len(ids) - 250
    batch = torch.tensor([ids[-250:]])
    wanted = text_model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=6, do_sample=False)
    assert row["token_ids"] == wanted[0, 250:].tolist()


def test_an_empty_dataset_ends_with_no_rows(run, tmp_path):
    assert run(dataset=[]) == []
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["finished"]


def test_a_dataset_is_read_as_it_is_needed(run):
    read = []

    def stream():
        for i in range(5000):
            read.append(i)
            yield DATA[i % 40]

    class Enough:
        def begin(self, glance): ...

        def end(self, glance): ...

        def update(self, glance):
            raise RuntimeError("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="enough"):
        patch.setattr(job, "LOOK_SECONDS", 0.0)
        run(dataset=stream(), progress=Enough())
    assert len(read) < 1000


class Stopper:
    """Ctrl-C once so many rows are written."""

    def __init__(self, after: int) -> None:
        self.after = after

    def begin(self, glance): ...

    def end(self, glance): ...

    def update(self, glance):
        if glance.written >= self.after:
            signal.raise_signal(signal.SIGINT)
            self.after = 1 << 60


def test_ctrl_c_ends_cleanly_and_the_same_call_goes_on(run, tmp_path, monkeypatch):
    plain = run()
    monkeypatch.setattr(job, "LOOK_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGINT)
    for form in ("jsonl", "parquet"):
        with pytest.raises(Interrupted) as stopped:
            run(form, progress=Stopper(9), format=form)
        assert signal.getsignal(signal.SIGINT) is before
        assert 9 <= stopped.value.summary.rows < 40 and not stopped.value.summary.finished
        assert len(list(read_rows(tmp_path / form))) == stopped.value.summary.rows
        run(form, format=form)
        found = sorted(read_rows(tmp_path / form), key=lambda row: row["row"])
        assert found == [json.loads(line) for line in plain]


def test_a_step_that_fails_ends_the_run_and_loses_nothing(run, tmp_path, monkeypatch):
    plain = run()
    step, steps = Engine.step, []

    def fails(engine):
        steps.append(1)
        if len(steps) > 20:
            raise RuntimeError("device lost")
        return step(engine)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device lost"):
        patch.setattr(Engine, "step", fails)
        run("again")
    assert 0 < len(lines(tmp_path / "again")) < 40
    assert run("again") == plain


def test_an_engine_of_the_callers_own_is_used_and_left_open(text_model, tokenizer, tmp_path, run):
    plain = run()
    with Engine(text_model, tokenizer=tokenizer, max_sequences=4, check=True) as engine:
        generate_dataset(engine, DATA, tmp_path / "engine", template=TEMPLATE, max_tokens=6)
        assert lines(tmp_path / "engine") == plain
        stats = engine.stats()
        assert stats.pages_free == stats.pages_total and not engine.has_work
        with pytest.raises(BadInput, match="page_size: the engine that is given has its own"):
            generate_dataset(engine, DATA, tmp_path / "no", template=TEMPLATE, page_size=4)
        engine.generate("one")


def test_changed_weights_and_data_are_refused_by_name(run, text_model):
    run()
    with pytest.raises(BadInput, match=r"Changed: dataset.first: "):
        run(dataset=[{"question": "other"}, *DATA[1:]])
    with torch.no_grad():
        text_model.lm_head.weight.add_(1.0)
    with pytest.raises(BadInput, match=r"Changed: model.weights: .* there, .* now"):
        run()


def test_the_pool_is_for_the_rows_that_run_and_not_for_the_dataset(run, tmp_path):
    run("short", max_sequences=2)
    peak = json.loads((tmp_path / "short" / "summary.json").read_text())["kv_peak_bytes"]
    page = 2 * 2 * 2 * 8 * 4 * 16  # K and V, layers, heads, head_dim, bytes, tokens
    assert peak <= 2 * (256 // 16 + 1) * page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 256}, "max_tokens=256: max_model_len allows 256"),
        ({"sampling": {"top_p": 2}}, "top_p=2"),
        ({"sampling": {"topp": 0.5}}, "topp"),
        ({"template": "{nope}"}, "no column 'nope'; the dataset has question"),
        ({"format": "xml"}, "format='xml'"),
        ({"window": 0}, "window=0"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"pagesize": 4}, "unknown engine setting 'pagesize'"),
        ({"messages": "chat"}, "not both"),
    ],
)
def test_bad_arguments_are_refused_by_name(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


# -- the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(60)))
    return path


def arguments(tiny: str, data: Path, out: Path, *more: object) -> list[str]:
    fixed = ("eval", "--model", tiny, "--dataset", data, "--out", out, "--max-tokens", 5, "--seed", 3)
    return [str(part) for part in (*fixed, *(("--template", TEMPLATE) if "--template" not in more else ()), *more)]


def invoke(*args):
    return CliRunner().invoke(app, arguments(*args))


def test_the_command_writes_rows_a_summary_and_a_picture(tiny, data, tmp_path):
    (tmp_path / "t.jinja").write_text("Q: {{ question }}\nA:\n")
    outputs = ("--json", tmp_path / "s.json", "--plot", tmp_path / "p.png", "--template", tmp_path / "t.jinja")
    result = invoke(tiny, data, tmp_path / "out", *outputs)
    assert result.exit_code == 0, result.output
    assert "60 rows in" in result.stdout and "hf-paged: 60/60 rows" in result.stderr
    rows = list(read_rows(tmp_path / "out"))
    assert len(rows) == 60 and all(row["prompt"].startswith("Q: ") for row in rows)
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"] == 60 and summary["generated_tokens"] == 300 and summary["finished"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    again = invoke(tiny, data, tmp_path / "out", "--template", tmp_path / "t.jinja")
    assert again.exit_code == 0 and "60 were there, 0 are new" in again.stdout


def test_the_command_refuses_by_name_with_exit_code_2(tiny, data, tmp_path):
    out = tmp_path / "out"
    assert invoke(tiny, data, out, "--temperature", 0.5).exit_code == 0
    for more, message in (
        (("--temperature", 0.7), "sampling.temperature: 0.5 there, 0.7 now"),
        (("--temperature", 0.5, "--template", "{question}"), "Changed: template"),
        (("--temperature", 0.5, "--dtype", "bfloat16"), "Changed: model.weights"),
        (("--template", "{nope}"), "no column 'nope'; the dataset has question"),
        (("--too-long", "cut"), "too_long='cut'"),
        (("--top-p", 3), "top_p=3"),
        (("--plot", "/nowhere/p.png"), "/nowhere/p.png"),
        (("--page-size", 999), "page_size=999"),
        (("--split", "test"), "split=test"),
    ):
        result = invoke(tiny, data, out, *more)
        assert result.exit_code == 2 and message in result.stderr, result.output
    with FileLock(out / ".lock-00000"):
        result = invoke(tiny, data, out, "--temperature", 0.5)
    assert result.exit_code == 2 and "in use by another run" in result.stderr


def test_the_command_takes_stops_as_a_shell_writes_newlines(tiny, data, tmp_path):
    stops = ("--stop", r"\n", "--stop", "x")
    assert invoke(tiny, data, tmp_path / "out", *stops, "--limit", 1).exit_code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["run"]["sampling"]["stop"] == ["\n", "x"]


def test_the_command_says_so_when_the_dataset_is_empty(tiny, tmp_path):
    (tmp_path / "rows.csv").write_text("question\n")
    result = invoke(tiny, tmp_path / "rows.csv", tmp_path / "out")
    assert result.exit_code == 0 and "the dataset is empty" in result.stdout


def test_the_command_ends_with_130_after_ctrl_c(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(job, "make_reporter", lambda: Stopper(1))
    result = invoke(tiny, data, tmp_path / "out", "--max-sequences", 4)
    assert result.exit_code == 130, result.output
    assert "not all yet" in result.stdout and "the same command goes on from there" in result.stderr
    monkeypatch.undo()
    assert invoke(tiny, data, tmp_path / "out").exit_code == 0
    assert invoke(tiny, data, tmp_path / "whole").exit_code == 0
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_ten_times_the_output_is_that_of_an_uninterrupted_run(tmp_path):
    """The bundled model, which is slow enough for a kill to fall among its rows."""
    data, whole, killed = tmp_path / "rows.jsonl", tmp_path / "whole", tmp_path / "killed"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(240)))
    draw = random.Random(1)

    def command(out: Path) -> list[str]:
        sampled = ("--temperature", 0.8, "--max-tokens", 16, "--max-sequences", 16, "--threads", 1)
        return [sys.executable, "-m", "hf_paged", *arguments(str(BUNDLED / "models" / "target"), data, out, *sampled)]

    subprocess.run(command(whole), check=True, capture_output=True)
    for _ in range(10):
        after = len(whole_lines(killed)) + draw.randint(1, 20)
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(whole_lines(killed)) < after:
            time.sleep(0.02 * draw.random())
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.wait()
    subprocess.run(command(killed), check=True, capture_output=True)
    assert lines(killed) == lines(whole)
    assert len(lines(killed)) == 240


def whole_lines(folder: Path) -> list[bytes]:
    """Lines written so far, a torn one left out."""
    path = folder / "part-00000.jsonl"
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")] if path.exists() else []
