"""Jobs over datasets in several processes: the rows of one, whatever becomes of a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_helpers import BUNDLED
from filelock import FileLock

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets import OutputDirectory, Shard
from hf_paged.integrations.datasets.chorus import Beacon, Chorus, beacon_file
from hf_paged.integrations.datasets.processes import ProcessDied, Processes
from hf_paged.integrations.datasets.sight import Glance
from hf_paged.integrations.datasets.summary import Summary
from hf_paged.integrations.datasets.totals import joined, summary_of

TEMPLATE = "Question: {{ question }}\nAnswer:"


def glance(written: int, **fields) -> Glance:
    usual = dict(seconds=2.0, failed=0, total=10, tokens_per_second=20.0, rows_per_second=2.0, seconds_left=4.0)
    usual |= dict(hit_rate=0.5, acceptance=None, kv_use=0.25, batch=3.0, in_flight=4)
    return Glance(written=written, **(usual | fields))


class Told(list):
    def begin(self, glance: Glance) -> None:
        self.append(glance)

    update = end = begin


def test_progress_of_all_is_told_by_the_first(tmp_path):
    told = Told()
    chorus = Chorus(told, tmp_path, 2, 20, (5, 1))
    beacon = Beacon(beacon_file(tmp_path, 1))
    chorus.begin(glance(3, failed=1))
    beacon.begin(glance(2, failed=1))
    beacon.update(glance(6, failed=2, seconds=3.0, hit_rate=1.0))
    chorus.update(glance(4, failed=1))
    beacon.end(glance(7, failed=2, seconds=4.0))
    chorus.end(glance(8, failed=1))
    chorus.look()
    chorus.close()
    chorus.close()
    assert [g.written for g in told] == [5, 5 + 1 + 4, 5 + 5 + 5, 5 + 5 + 5]
    assert [g.failed for g in told] == [1, 2, 2, 2]
    assert (told[1].rows_per_second, told[1].seconds_left, told[1].hit_rate, told[1].batch) == (4.0, 2.5, 0.75, 6.0)
    assert (told[2].rows_per_second, told[3].rows_per_second) == (0.0, 4.0)


def test_summaries_add_up():
    first = Summary("out", True, 3, 1, 1, {"a": 1}, 30, seconds=2.0, engine_seconds=1.0)
    first.timeline = {"seconds": [0.0, 2.0], "kv_use": [0.2, 0.4], "written": [0.0, 3.0]}
    second = Summary("out", False, 5, 1, 3, {"a": 1, "b": 2}, 50, seconds=4.0, engine_seconds=4.0)
    second.timeline = {"seconds": [0.0, 1.0, 4.0], "kv_use": [0.0, 0.4, 0.4], "written": [0.0, 2.0, 5.0]}
    total = joined([summary_of(json.loads(json.dumps(first.to_dict()))), second])
    assert (total.finished, total.rows, total.failed, total.errors) == (False, 8, 4, {"a": 2, "b": 2})
    assert (total.generated_tokens, total.seconds, total.tokens_per_second) == (80, 4.0, 20.0)
    assert total.outside_engine == pytest.approx(1 / 6)
    assert total.timeline["written"] == [0.0, 3.5, 8.0]
    assert total.timeline["kv_use"] == pytest.approx([0.1, 0.35, 0.2])


def test_a_process_without_a_launcher_is_alone(tmp_path):
    with Processes(None) as processes:
        assert (processes.shard, processes.device) == (Shard(), None)
        told = Told()
        assert processes.reporter(told, 3) is told
        directory = OutputDirectory(tmp_path / "out", shard=processes.shard)
        processes.begin(directory, lambda: directory.prepare({"run": {}, "about": {}}))
        directory.close()
        processes.finish(directory, Summary("out"))
    assert (tmp_path / "out" / "summary.json").exists()


def test_a_process_that_died_is_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_paged.integrations.datasets.processes.GRACE_SECONDS", 0.0)
    processes = Processes((0, 2))
    with FileLock(tmp_path / ".lock-00001"):
        (tmp_path / "summary-00001.json").write_text(json.dumps(Summary("out", rows=4).to_dict()))
        assert processes._summary_of(tmp_path, 1).rows == 4
    (tmp_path / "summary-00001.json").unlink()
    with pytest.raises(ProcessDied, match=r"process 1 of 2 ended before .* the same command again"):
        processes._summary_of(tmp_path, 1)


# -- real processes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [json.dumps({"question": f"What is {i} + {3 * i % 7}?"}) for i in range(41)]
    path.write_text("\n".join(lines) + "\n")
    return path


def arguments(dataset: Path, out: Path, *more: str) -> list[str]:
    job = [
        "eval",
        "--model",
        str(BUNDLED / "models" / "target"),
        "--dataset",
        str(dataset),
        "--out",
        str(out),
        "--template",
        TEMPLATE,
    ]
    return [*job, "--max-tokens", "8", "--temperature", "0.8", "--seed", "3", "--max-sequences", "2", *more]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    settings = clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", *command], env=settings, **pipes)


def done(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def launch(count: int, job: list[str]) -> tuple[int, str, str]:
    """`accelerate launch`: of its launchers this is the one that starts several processes without mpirun."""
    launcher = ["accelerate.commands.launch", "--num_processes", str(count), "--main_process_port", "0"]
    launcher += ["--multi_gpu"] if count > 1 else ["--cpu"]
    return done(start([*launcher, "-m", "hf_paged", *job]))


def lines(folder: Path) -> list[bytes]:
    found = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines(True)]
    return sorted(found, key=lambda line: json.loads(line)["row"])


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    out = tmp_path_factory.mktemp("alone")
    code, _, err = done(start(["hf_paged", *arguments(dataset, out)]))
    assert code == 0, err
    return lines(out)


@pytest.mark.slow
def test_two_processes_then_one_then_three_give_the_rows_of_one(dataset, alone, tmp_path):
    code, said, err = launch(2, arguments(dataset, tmp_path, "--limit", "15"))
    assert code == 0, err
    assert lines(tmp_path) == alone[:15]
    assert {path.name for path in tmp_path.glob("part-*")} == {"part-00000.jsonl", "part-00001.jsonl"}
    assert said.count("15 rows in") == 1 and err.count("hf-paged: 15/15 rows") == 1
    assert not list(tmp_path.glob("summary-*")) and not list(tmp_path.glob(".progress-*"))
    assert launch(1, arguments(dataset, tmp_path, "--limit", "23"))[0] == 0
    code, said, err = launch(3, arguments(dataset, tmp_path))
    assert code == 0, err
    assert lines(tmp_path) == alone and len(alone) == 41
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rows"], summary["rows_before"], summary["finished"]) == (18, 23, True)
    assert summary["generated_tokens"] == sum(len(json.loads(line)["token_ids"]) for line in alone[23:])
    code, _, err = launch(2, arguments(dataset, tmp_path, "--top-k", "3"))
    assert code != 0 and "holds a run with other settings" in err and "top_k" in err


def pair(job: list[str], port: int) -> list[subprocess.Popen]:
    """Two processes as a launcher starts them, without one that ends both when one dies."""
    common = dict(ACCELERATE_USE_CPU="true", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [start(["hf_paged", *job], RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in (0, 1)]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_killed_process_fails_the_job_by_name_and_the_job_resumes(dataset, alone, tmp_path):
    first, second = pair(arguments(dataset, tmp_path), free_port())
    part, until = tmp_path / "part-00001.jsonl", time.monotonic() + 200
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    assert second.wait(60) == -signal.SIGKILL
    code, _, err = done(first)
    second.communicate()
    assert code != 0 and "process 1 of 2 ended before its rows were done" in err
    assert 0 < len(lines(tmp_path)) < len(alone)
    code, _, err = launch(2, arguments(dataset, tmp_path))
    assert code == 0, err
    assert lines(tmp_path) == alone


@pytest.mark.slow
def test_a_directory_that_the_first_process_refuses_ends_all(dataset, tmp_path):
    (tmp_path / "part-00000.jsonl").write_text("{}\n")
    for rank, process in enumerate(pair(arguments(dataset, tmp_path), free_port())):
        code, _, err = done(process)
        assert code == 2 and "give an empty directory" in err
        assert ("process 0 of 2:" in err) == (rank == 1)


def test_bad_shards_are_refused():
    with pytest.raises((BadInput, ValueError), match="shard"):
        Processes((2, 2))
