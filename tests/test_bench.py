"""The benchmarks' parts: files, figures, peers, turns and the comparison of tokens. Nothing here looks at a clock."""

from __future__ import annotations

import gzip
import json
import sys
import textwrap

import pytest
import torch
from cli_helpers import BUNDLED, save_tiny
from typer.testing import CliRunner

from hf_paged.integrations.bench.data import BadInput, read_lengths, read_prompts
from hf_paged.integrations.bench.equality import compare, generate_alone
from hf_paged.integrations.bench.latency import run_latency
from hf_paged.integrations.bench.memory import measure_elsewhere
from hf_paged.integrations.bench.models import kv_bytes_per_token, load
from hf_paged.integrations.bench.peers import HfContinuous, HfGenerate
from hf_paged.integrations.bench.result import Run, per_token, percentile, summary
from hf_paged.integrations.bench.throughput import run_throughput, without_end_token
from hf_paged.integrations.bench.vllm_peer import worker_environment
from hf_paged.integrations.bench.workload import Workload, build_workload
from hf_paged.integrations.cli import app


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(save_tiny(tmp_path_factory.mktemp("model")), "float32", "cpu")


@pytest.fixture(scope="module")
def work() -> Workload:
    prompts = ((5, 9, 12), (40, 41, 42, 43, 44), (7,), (100, 300, 200, 50))
    return Workload(prompts, (6, 1, 9, 4))


# -- files


def test_prompts_come_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.csv").write_text('id,question\n1,"two, or\nthree?"\n2,four?\n')
    with gzip.open(tmp_path / "a.csv.gz", "wt") as out:
        out.write((tmp_path / "a.csv").read_text())
    (tmp_path / "a.jsonl").write_text('{"question": "two, or\\nthree?"}\n\n{"question": "four?"}\n')
    for name in ("a.csv", "a.csv.gz", "a.jsonl"):
        assert read_prompts(tmp_path / name, "question") == ["two, or\nthree?", "four?"]
    assert read_prompts(tmp_path / "a.csv", "question", "Q: {question}\nA:", 1) == ["Q: two, or\nthree?\nA:"]
    (tmp_path / "turns.jsonl").write_text('{"turns": ["first", "second"]}\n')
    assert read_prompts(tmp_path / "turns.jsonl", "turns") == ["first"]


def test_braces_in_a_prompt_are_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a {dict} here"}\n')
    assert read_prompts(tmp_path / "a.jsonl", "prompt", "<{prompt}>") == ["<a {dict} here>"]


def test_lengths_are_capped_and_at_least_one(tmp_path):
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\na,5,0\nb,5,44\nc,5,900\n")
    assert read_lengths(str(tmp_path / "trace.csv"), 3, 256) == [1, 44, 256]
    assert read_lengths(str(tmp_path / "trace.csv"), 1, 256, "ContextTokens") == [5]
    assert read_lengths("300", 2, 256) == [256, 256]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a,b\n1,2\n", "--lengths-field"),
        ("a\nx\ny\nz\n", "not a number"),
        ("a\n", "none|no rows"),
        ("a\n1\n", "3 rows"),
    ],
)
def test_bad_lengths_are_named(tmp_path, text, word):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(BadInput, match=word):
        read_lengths(str(tmp_path / "x.csv"), 3, 256)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "x.csv.gz").write_bytes(b"not gzipped")
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    for name, word in (("x.csv.gz", "cannot be read"), ("x.parquet", "kind of file"), ("list.jsonl", "JSON object")):
        with pytest.raises(BadInput, match=word):
            read_prompts(tmp_path / name, "question")


def test_the_bundled_prompts_and_lengths_go_together(loaded):
    texts = read_prompts(BUNDLED / "data" / "prompts.jsonl", "question")
    lengths = read_lengths(str(BUNDLED / "data" / "output_lengths.csv"), len(texts), 256)
    assert len(texts) == 64 and len(set(lengths)) > 20
    assert len(build_workload(loaded.tokenizer, texts, lengths, 2048)) == 64


def test_a_row_longer_than_the_model_allows_is_refused(loaded):
    with pytest.raises(BadInput, match="takes 256 in all"):
        build_workload(loaded.tokenizer, ["a few words"], [255], loaded.limit)


# -- figures


def test_percentiles_interpolate_and_skip_what_is_not_known():
    assert percentile([3.0, None, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert percentile([None], 0.5) is None
    assert per_token(1.0, 3.0, 5) == 0.5 and per_token(1.0, 1.0, 1) is None


def test_medians_over_runs_count():
    runs = [Run([[1, 2]], seconds, [seconds / 2], [seconds / 2]) for seconds in (9.0, 1.0, 2.0)]
    row = summary("x", runs)
    assert (row["seconds"], row["tokens"], row["tokens_per_second"], row["ttft_p50"]) == (2.0, 2, 1.0, 1.0)


# -- engines


def test_all_engines_make_the_tokens_of_each_row_alone(loaded, work):
    report = run_throughput(loaded, work, ["hf"], repeats=2, settings={"page_size": 4, "num_pages": 64})
    assert [row["engine"] for row in report["rows"]] == ["hf_paged", "hf"]
    for row in report["rows"]:
        assert row["tokens_equal"] and row["rows_differing"] == 0, row
        assert row["tokens"] == work.tokens and len(row["seconds_of_runs"]) == 2
    assert set(report["ratios"]) == {"hf"} and report["tokens_equal"]
    ours = report["rows"][0]
    assert 0 <= ours["kv_waste"] < 1 and 0 <= ours["detail"]["outside_forward"] < 1
    json.dumps(report)
    assert loaded.model.generation_config.eos_token_id == 0


def test_continuous_batching_makes_each_requests_own_length(loaded, work):
    with without_end_token(loaded.model):
        reference = generate_alone(loaded.model, work, 1, lambda: None)
        run = HfContinuous(loaded.model, num_blocks=8, max_batch_tokens=64).run(work)
    assert run.tokens == reference
    assert [value is None for value in run.tpot] == [n == 1 for n in work.lengths]


def test_padded_batches_hold_slots_that_nobody_needs(loaded):
    load_ = Workload(((5, 6, 7, 8), (9,)), (1, 3))
    with without_end_token(loaded.model):
        run = HfGenerate(loaded.model, 1, sizes=(8,)).run(load_)
    # Both rows hold 4, 5 and 6 slots; the first needs 4 once, the second 1, 2 and 3.
    assert run.kv_waste == pytest.approx(1 - (4 + 1 + 2 + 3) / (2 * (4 + 5 + 6)))
    assert [len(row) for row in run.tokens] == [1, 3]


def test_a_difference_is_placed_and_its_gap_told(loaded, work):
    with without_end_token(loaded.model):
        reference = generate_alone(loaded.model, work, 1, lambda: None)
    changed = [list(row) for row in reference]
    changed[2][4] = (changed[2][4] + 1) % 4096
    found = compare(loaded.model, work, reference, changed)
    assert not found["tokens_equal"] and found["rows_differing"] == 1
    assert (found["differences"][0]["row"], found["differences"][0]["position"]) == (2, 4)
    assert found["differences"][0]["top2_gap"] > 0
    assert compare(loaded.model, work, reference, reference)["tokens_equal"]


def test_latency_compares_one_request_at_a_time(loaded, work):
    report = run_latency(loaded, work.only([0, 2]), ["hf"], repeats=1, settings={"num_pages": 32})
    assert report["tokens_equal"] == {"hf": True}
    assert [row["engine"] for row in report["rows"]] == ["hf_paged", "hf"]
    assert set(report["ratios"]["hf"]) == {"ttft", "tpot", "seconds"}


def test_memory_is_measured_in_a_process_of_its_own(loaded, work):
    report = measure_elsewhere(loaded.name, "float32", work, {"num_pages": 64, "page_size": 4})
    assert report["within_limit"] == (report["above_model_bytes"] <= report["limit_bytes"])
    assert report["model_rss_bytes"] > 0 and report["above_model_bytes"] >= 0
    # The KV of no more than all tokens, and of no less than the longest row but its last token.
    token = kv_bytes_per_token(loaded.model.config, loaded.model.dtype)
    assert 9 * token <= report["kv_live_peak_bytes"] <= 33 * token


# -- vLLM


FAKE_VLLM = """
import sys
from types import SimpleNamespace
__version__ = "9.9"
print("noise on stdout")
class SamplingParams(SimpleNamespace):
    pass
class LLM:
    def __init__(self, model, **settings):
        if settings["max_model_len"] > 200:
            sys.exit("out of luck")
    def generate(self, prompts, params, use_tqdm):
        print("more noise")
        times = SimpleNamespace(first_token_latency=0.5, first_token_ts=1.0, last_token_ts=2.0)
        made = [[p["prompt_token_ids"][0]] * q.max_tokens for p, q in zip(prompts, params)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)], metrics=times) for ids in made]
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(textwrap.dedent(FAKE_VLLM))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_vllm_worker_answers_round_by_round(loaded, fake_vllm):
    load_ = Workload(((5, 6), (9,)), (3, 1))
    loaded_ = type(loaded)(loaded.name, loaded.model, loaded.tokenizer)
    loaded_.model.config.max_position_embeddings = 128
    try:
        report = run_throughput(loaded_, load_, ["vllm"], repeats=2, vllm_python=sys.executable)
    finally:
        loaded.model.config.max_position_embeddings = 256
    row = report["rows"][1]
    assert (row["engine"], row["tokens"], row["ttft_p50"], row["tpot_p50"]) == ("vllm", 4, 0.5, 0.5)
    assert row["detail"] == {"version": "9.9"}
    assert row["tokens_equal"] is False and report["tokens_equal"]


def test_a_worker_that_dies_is_told_with_its_last_words(loaded, work, fake_vllm):
    with pytest.raises(RuntimeError, match="out of luck"):
        run_throughput(loaded, work, ["vllm"], repeats=1, vllm_python=sys.executable)


def test_an_ngram_speculation_that_vllm_refuses_is_left_out_and_named(loaded, tmp_path, monkeypatch):
    refusal = """
        if settings["speculative_config"] is not None:
            raise NotImplementedError("no ngram here")
        if settings["max_model_len"] > 400:"""
    fake = FAKE_VLLM.replace(
        """
        if settings["max_model_len"] > 200:""",
        refusal,
    )
    (tmp_path / "vllm.py").write_text(textwrap.dedent(fake))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = ["bench", "speculation", "-m", loaded.name, "-n", "2", "--new-tokens", "3", "--batches", "1,2"]
    args += ["--repeats", "1", "--methods", "lookup", "--no-peers", "--vllm-python", sys.executable]
    result = CliRunner().invoke(app, [*args, "--json", "-"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = [row for row in report["rows"] if row["engine"].startswith("vllm")]
    found = [(row["engine"], row["batch"], row["version"], row["tokens_equal"]) for row in rows]
    assert found == [("vllm", 1, "9.9", False), ("vllm", 2, "9.9", False)]
    assert report["skipped"] == {"vllm ngram": "NotImplementedError: no ngram here"}
    assert "no ngram here" in CliRunner().invoke(app, args).stdout


def test_an_interpreter_without_vllm_is_left_out_and_named(loaded, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    args = [
        "bench",
        "throughput",
        "-m",
        loaded.name,
        "-n",
        "2",
        "--output-lengths",
        "3",
        "--repeats",
        "1",
        "--json",
        "-",
    ]
    result = CliRunner().invoke(app, [*args, "--no-check", "--peers", "vllm", "--vllm-python", sys.executable])
    assert result.exit_code == 0, result.output
    assert "none here" in json.loads(result.stdout)["skipped"]["vllm"] and "left out" in result.stderr


def test_the_workers_environment_keeps_what_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    local, hub = worker_environment(str(tmp_path), 3 * 2**30), worker_environment("org/name", 1)
    assert local["VLLM_CPU_KVCACHE_SPACE"] == "7" and local["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in hub and hub["VLLM_CPU_OMP_THREADS_BIND"]


def test_gpu_benchmark_in_small(monkeypatch):
    """On a CPU, where nothing is captured: everything that the report is shown from."""
    from hf_paged.integrations.bench import gpu
    from hf_paged.integrations.bench.kernels import Scale
    from hf_paged.integrations.cli.bench_gpu import show_gpu

    small = Scale(device="cpu", dtype=torch.float32, copy_bytes=1 << 16, matmul=32)
    load = gpu.Load("tiny", 3, 5, 4, ("hf",))
    monkeypatch.setattr(gpu, "STEPS", 3)
    monkeypatch.setattr(gpu, "STEP", (2, 6))
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend="eager", **options))
    report = gpu.run_gpu([load, gpu.Load("tiny-gemma", 2, 5, 4)], "cpu", torch.float32, scale=small)
    model, own = report["models"]
    assert "compiled" not in model and own["compiled"]["step"]["seconds"] > 0 and own["compiled"]["compile_seconds"] > 0
    assert model["greedy"]["tokens_per_second"] > 0 and model["peers"]["hf"]["seconds"] > 0
    assert model["step"]["over_roofline"] > 0 and not model["graphs"]
    show_gpu(report)
