"""vLLM as a peer: a process of its own, under an interpreter that has it, that works only when told."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.bench.result import Run
from hf_paged.integrations.bench.workload import Workload

WORKER = Path(__file__).with_name("vllm_worker.py")


class NoVllm(RuntimeError):
    """The interpreter has no vLLM."""


def worker_environment(model: str, kv_bytes: int) -> dict[str, str]:
    """Environment of the worker: what is set already stays; the rest is what ran fastest on CPUs.

    On a CPU vLLM is fastest inside one process with its threads bound to all cores this process may use (its
    `auto` leaves one out). The KV space is what the workload needs, in whole GiB.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "all"
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-kv_bytes // 2**30))),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ}


class Vllm:
    """The worker process, seen as a peer.

    Args:
        speculation: vLLM's `speculative_config`; None: nothing is drafted.

    Raises:
        BadInput: if the interpreter cannot be run.
        NoVllm: if it cannot import vLLM.
        RuntimeError: if the worker dies; the message ends with the last lines it printed.
    """

    name = "vllm"

    def __init__(
        self,
        python: str,
        model: str,
        dtype: str,
        max_model_len: int,
        kv_bytes: int,
        speculation: dict[str, Any] | None = None,
    ) -> None:
        settings = {"model": model, "dtype": dtype, "max_model_len": max_model_len, "speculation": speculation}
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(WORKER), json.dumps(settings)],  # else modules beside it shadow packages
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=worker_environment(model, kv_bytes),
            )
        except OSError as error:
            self._log.close()
            raise BadInput(f"--vllm-python {python}: cannot be run: {error}") from error
        try:
            first = self._read()
            if "missing" in first:
                raise NoVllm(f"{python} cannot import vllm: {first['missing']}")
        except BaseException:
            self.close()
            raise
        self.version = first["ready"]

    def warm(self, load: Workload) -> None:
        self.run(load)

    def run(self, load: Workload) -> Run:
        order = {"prompts": load.prompts, "lengths": load.lengths}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        detail = {"version": self.version}
        return Run(reply["tokens"], reply["seconds"], reply["ttft"], reply["tpot"], None, detail)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        tail = "\n".join(self._log.read().splitlines()[-12:])
        raise RuntimeError(f"the vLLM worker ended with code {code}:\n{tail}")
