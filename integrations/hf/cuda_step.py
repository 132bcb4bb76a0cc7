"""Decode steps in CUDA graphs: forward, draw, and on to the next token, without the host in between.

A graph is captured when a bucket of rows and of context is first met; all share one pool of memory, since they never
run at once. What changes from burst to burst comes by one copy, tokens go back by one copy a step, which the host takes
while the device is at the next.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_paged.config import CoreSettings, EngineConfig, require
from hf_paged.integrations.decode_inputs import Layout, batch_bucket, clear, fill, static_plan, width_bucket
from hf_paged.integrations.inspect import PagedForward
from hf_paged.kernels import runs_triton
from hf_paged.kernels.backends import told
from hf_paged.plan import PlanRow, StepPlan
from hf_paged.speculation.visit import Plan
from hf_paged.store import KVStore

# Steps at one visit of the host: as many as take this long. A request that arrives waits so long at most.
SECONDS, LEAST, MOST = 0.1, 8, 64


class Refused(ValueError):
    """Decode steps cannot be captured; the message says why."""


def check(store: KVStore, device: torch.device, backend: str) -> None:
    """Whether a step's ops can be captured there.

    Raises:
        Refused: they cannot.
    """
    if device.type != "cuda":
        raise Refused(f"the model is on {device.type}")
    if not runs_triton(device.type, backend):
        raise Refused("the attention ops are torch's")
    check_pages(store)


def check_pages(store: KVStore) -> None:
    """Whether the kernels take the pages of all layers.

    Raises:
        Refused: they do not.
    """
    from hf_paged.kernels.launch import head_shape, unsupported
    from hf_paged.kernels.triton_path import reads

    if not reads(store.dtype, store.keys[0].device):
        raise Refused(f"there are no kernels for KV in {store.dtype}")
    for keys, values in zip(store.keys, store.values, strict=True):
        wrong = unsupported(head_shape(keys.shape[1], keys, values))
        if wrong is not None:
            raise Refused(wrong)


class Direct:
    """What runs a step where it is called: for tests, and to find out what a graph would hide."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    def forget(self) -> None:
        """Nothing that was captured is used any more."""


class Graphs:
    """Captures steps, in one pool of memory."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing that was captured is used any more. A pool whose graphs are all gone takes no new ones."""
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A replay of `step`, which has run once before, so that all kernels are compiled."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


class DecodeStepper:
    """Runs bursts of decode steps; see `hf_paged.burst.Stepper`.

    Args:
        forward: plan → logits `[rows, vocab]`.
        store: the model's KV.
        most_rows, most_slots: of a step, and of a row.
        backend: as in `EngineConfig`.
        runner: `Graphs()`, or `Direct()`.
    """

    lines = slots = 0  # drafts are verified step by step

    def __init__(
        self,
        forward: Callable[[StepPlan], torch.Tensor],
        store: KVStore,
        most_rows: int,
        most_slots: int,
        backend: str = "auto",
        runner: Graphs | Direct | None = None,
        most: int = LEAST,
    ) -> None:
        self.forward, self.store, self.backend, self.most = forward, store, backend, most
        self.device = store.keys[0].device
        self.runner = runner or Graphs()
        self.failure: str | None = None
        slots = min(most_slots, store.num_pages * store.page_size) + MOST
        self.widest = Layout(batch_bucket(most_rows), width_bucket(slots, store.page_size))
        pinned = self.device.type == "cuda"
        self._host = torch.zeros(self.widest.size, dtype=torch.uint8, pin_memory=pinned)
        self._inputs = torch.zeros(self.widest.size, dtype=torch.uint8, device=self.device)
        shape = MOST, 2 * self.widest.rows
        self._told = torch.zeros(shape, dtype=torch.int32, pin_memory=pinned)
        self._events = [torch.cuda.Event() for _ in range(MOST)] if pinned else []
        self._steps: dict[Layout, tuple[Callable[[], None], torch.Tensor, StepPlan]] = {}  # a graph keeps no tensor
        self._known: Any = None
        self.clock: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] | None = None  # begin, end, steps of bursts

    def forget(self, known: Any = None) -> None:
        """Drop what was captured, unless it was captured with a model that was, and is, `known`."""
        if known is None or known != self._known:
            self._steps.clear()
            self.runner.forget()
        self._known = known

    def run(self, rows: Sequence[PlanRow], steps: int) -> Iterator[tuple[list[int], list[float]]] | None:
        """See `hf_paged.burst.Stepper`. After a failure: None, for good."""
        longest = max(planned.sequence.computed for planned in rows) + steps + 1
        bucket = Layout(batch_bucket(len(rows)), width_bucket(longest, self.store.page_size))
        if self.failure is not None or bucket.size > self.widest.size:
            return None
        arrays = bucket.arrays(self._host.numpy())
        bucket = replace(bucket, shared=fill(arrays, rows, self.store.page_size))
        if bucket not in self._steps:
            if not self._prepare(bucket, arrays):
                return None
            fill(arrays, rows, self.store.page_size)
        self._send(bucket)
        replay, out, _ = self._steps[bucket]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.clock is not None else []
        if marks:
            marks[0].record()
        for step in range(steps):
            replay()
            self._told[step, : out.numel()].copy_(out.view(-1), non_blocking=True)
            if self._events:
                self._events[step].record()
        if marks:
            marks[1].record()
            self.clock.append((marks[0], marks[1], steps))
        return self._tell(len(rows), bucket.rows, steps)

    def verify(self, plan: Plan) -> None:
        """See `hf_paged.burst.Stepper`."""

    def _tell(self, rows: int, lines: int, steps: int) -> Iterator[tuple[list[int], list[float]]]:
        told, begun = self._told.numpy(), time.perf_counter()
        for step in range(steps):
            if self._events:
                self._events[step].synchronize()
            if step + 1 == steps and self._events:
                pace = (time.perf_counter() - begun) / steps
                self.most = min(max(int(SECONDS / pace), LEAST), MOST)
            tops = told[step, lines : lines + rows].view(np.float32)
            yield told[step, :rows].tolist(), tops.tolist()

    def _send(self, bucket: Layout) -> None:
        self._inputs[: bucket.size].copy_(self._host[: bucket.size], non_blocking=True)

    def _prepare(self, bucket: Layout, arrays: dict[str, np.ndarray]) -> bool:
        """Capture the step of a bucket, over no rows. False: it cannot be; it is not tried again."""
        clear(arrays)
        self._send(bucket)
        tensors = bucket.tensors(self._inputs)
        plan = static_plan(tensors, self.store.page_size, self.backend, bucket.shared)
        out = torch.zeros(2, bucket.rows, dtype=torch.int32, device=self.device)
        try:
            self._steps[bucket] = self.runner.capture(lambda: self._step(plan, tensors, out)), out, plan
        except torch.OutOfMemoryError:
            self._fail("no memory is left for it: a smaller memory_fraction leaves more")
        except Exception as error:
            if isinstance(self.runner, Direct):
                raise
            self._fail(told(error))
        return self.failure is None

    def _fail(self, why: str) -> None:
        self.failure = why
        self._steps.clear()
        warnings.warn(
            f"hf_paged: steps of this model cannot be captured in CUDA graphs, they are launched one by one ({why})",
            RuntimeWarning,
            stacklevel=6,
        )

    def _step(self, plan: StepPlan, tensors: dict[str, torch.Tensor], out: torch.Tensor) -> None:
        from hf_paged.kernels.advance import advance
        from hf_paged.kernels.draw import draw

        logits = self.forward(plan)
        given = [tensors[name] for name in ("temperature", "limit", "min_p", "top_k", "seeds", "context")]
        draw(logits, *given, out=out)
        names = ("ids", "positions", "slots", "context", "table")
        advance(out, *(tensors[name] for name in names), self.store.page_size)


def make_stepper(
    config: EngineConfig, forward: PagedForward, store: KVStore, settings: CoreSettings
) -> DecodeStepper | None:
    """What decodes in graphs; None where nothing does.

    Raises:
        ValueError: graphs are asked for where they cannot be.
    """
    if config.cuda_graphs is False:
        return None
    try:
        check(store, store.keys[0].device, config.backend)
    except Refused as error:
        require(config.cuda_graphs == "auto", "cuda_graphs", config.cuda_graphs, f"{error}; auto or False")
        return None
    return DecodeStepper(forward.logits, store, settings.max_sequences, settings.max_model_len, config.backend)
