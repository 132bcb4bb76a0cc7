"""Jobs over datasets on Ray Data: the rows of one process, also where a worker is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import BUNDLED
from typer.testing import CliRunner

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.cli import app
from hf_paged.integrations.datasets import generate_dataset, ray_backend

MODEL = str(BUNDLED / "models" / "target")
JOB = dict(template="Question: {{ question }}\nAnswer:", max_tokens=8, sampling={"temperature": 0.8}, seed=3)
JOB |= dict(max_sequences=2, num_pages=256)
SCRIPT = """
import json, os, signal, sys, ray
from hf_paged.integrations.datasets import generate_dataset, ray_backend

model, data, out, marker, job = sys.argv[1:]


class Killed(ray_backend.Worker):
    # Whoever has sent some of its rows first is killed, once: the marker can be made only once.
    def __call__(self, batch):
        for block in super().__call__(batch):
            yield block
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)


ray_backend.Worker = Killed
ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
summary = generate_dataset(model, data, out, backend="ray", workers=2, window=8, **json.loads(job))
print("SUMMARY", json.dumps(summary.to_dict()))
"""


def test_what_ray_cannot_do_is_refused_by_name(tmp_path, monkeypatch, text_model, tokenizer):
    rows = [{"prompt": "one"}]
    with pytest.raises(BadInput, match="every worker loads the model"):
        generate_dataset(text_model, rows, tmp_path, tokenizer=tokenizer, backend="ray")
    with pytest.raises(BadInput, match="workers=0"):
        generate_dataset(MODEL, rows, tmp_path, backend="ray", workers=0)
    with pytest.raises(BadInput, match="workers=2: for backend='ray' only"):
        generate_dataset(text_model, rows, tmp_path, tokenizer=tokenizer, workers=2)
    monkeypatch.setattr(ray_backend, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs Ray: pip install 'hf-paged\[ray\]'"):
        generate_dataset(MODEL, rows, tmp_path, backend="ray")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    job = ["eval", "--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--backend", "ray"]
    result = CliRunner().invoke(app, job)
    assert result.exit_code == 2 and "pip install 'hf-paged[ray]'" in result.stderr


def lines(folder: Path) -> list[bytes]:
    found = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines(True)]
    return sorted(found, key=lambda line: json.loads(line)["row"])


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(tmp_path):
    pytest.importorskip("ray.data", reason="Ray is not installed")
    data, out, marker = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "killed"
    data.write_text("".join(json.dumps({"question": f"What is {i} + {3 * i % 7}?"}) + "\n" for i in range(160)))
    generate_dataset(MODEL, str(data), tmp_path / "alone", **JOB)
    command = [sys.executable, "-c", SCRIPT, MODEL, str(data), str(out), str(marker)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(limit: int) -> str:
        job = json.dumps(JOB | {"limit": limit})
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run([*command, job], env=environment, timeout=600, **pipes)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    run(120)
    assert marker.exists(), "no worker was killed"
    expected = lines(tmp_path / "alone")
    assert lines(out) == expected[:120]
    said = run(160)
    assert lines(out) == expected and len(expected) == 160
    summary = json.loads(said[said.index("SUMMARY") + 8 :].splitlines()[0])
    assert (summary["rows"], summary["rows_before"], summary["finished"]) == (40, 120, True)
    assert summary["generated_tokens"] == sum(len(json.loads(line)["token_ids"]) for line in expected[120:])
