"""`hf-paged bench memory`: peak memory above the model, against the KV bytes that live tokens need.

Run as a process of its own, since a peak is that of the whole life of a process:
`python -m hf_paged.integrations.bench.memory` with a JSON order on stdin.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from typing import Any

import torch

from hf_paged.integrations.bench.models import load
from hf_paged.integrations.bench.peers import Paged
from hf_paged.integrations.bench.workload import Workload

ALLOWANCE = 100 * 10**6  # bytes that buffers and code may take on top
FACTOR = 1.3


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident() -> int:
    """Resident memory of this process, in bytes; 0 where it is not known."""
    return _status("VmRSS") or 0


class PeakMemory:
    """Resident memory of this process when it began and at its peak since, in bytes.

    The kernel keeps the peak and lets it be reset; where it does not, a thread looks often.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.before = resident()
        try:
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")
        except OSError:
            pass
        self.exact = (_status("VmHWM") or 0) <= self.before + 2**20
        self._peak, self._stop = self.before, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, resident())
            time.sleep(0.01)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = (_status("VmHWM") or 0) if self.exact else self._peak


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Load the model, answer the workload once, and tell the memory it took.

    The model's own memory is what the process holds after one plain forward, which touches all weights.
    """
    loaded = load(order["model"], order["dtype"], "cpu")
    work = Workload(tuple(map(tuple, order["prompts"])), tuple(order["lengths"]))
    with torch.inference_mode():
        loaded.model(torch.tensor([work.prompts[0]]), use_cache=False)
    with PeakMemory() as memory:
        # What a prefix cache keeps is no need of the requests that run: it goes when its pages are needed.
        peer = Paged(loaded.model, **order["settings"], prefix_caching=False)
        run = peer.run(work)
        peer.close()
    live = run.detail["kv_live_peak_bytes"]
    above, limit = memory.peak - memory.before, FACTOR * live + ALLOWANCE
    return {
        "benchmark": "memory",
        "model": loaded.name,
        "dtype": order["dtype"],
        "requests": len(work),
        "model_rss_bytes": memory.before,
        "peak_rss_bytes": memory.peak,
        "above_model_bytes": above,
        "kv_live_peak_bytes": live,
        "kv_peak_bytes": run.detail["kv_peak_bytes"],
        "kv_waste": run.kv_waste,
        "limit_bytes": int(limit),
        "within_limit": above <= limit,
    }


def measure_elsewhere(model: str, dtype: str, work: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: if that process fails; the message ends with its last lines.
    """
    order = {
        "model": model,
        "dtype": dtype,
        "prompts": work.prompts,
        "lengths": work.lengths,
        "settings": settings,
    }
    done = subprocess.run(
        [sys.executable, "-m", "hf_paged.integrations.bench.memory"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-12:])
        raise RuntimeError(f"measuring the memory failed with code {done.returncode}:\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
