"""`hf-paged bench kernels`: paged attention on a GPU, as shares of what the card was measured to give."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.throughput import Progress
from hf_paged.kernels import PagedRows, choose_backend, paged_attention
from hf_paged.kernels.fp8 import FP8, narrowed, selected

DECODES = ((1, 32768), (16, 8192), (64, 4096), (256, 1024))
SWEEP = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256)  # rows, of together `SWEEP_SLOTS`
SWEEP_SLOTS = 1 << 18
PREFILL = 8192
VERIFY = (64, 8, 4096)  # rows, tokens each, slots each
SHARED = (64, 8192, 7680)  # rows, slots each, slots that all have in common


@dataclass(frozen=True)
class Scale:
    """What is measured. `heads` query heads over `kv_heads`, of `dim`; `calls` layers with KV of their own a timing."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    repeats: int = 5
    decodes: tuple[tuple[int, int], ...] = DECODES
    sweep: tuple[int, ...] = SWEEP
    sweep_slots: int = SWEEP_SLOTS
    prefill: int = PREFILL
    verify: tuple[int, int, int] = VERIFY
    shared: tuple[int, int, int] = SHARED
    copy_bytes: int = 1 << 31
    matmul: int = 8192
    layer_bytes: int = 1 << 30  # KV that a timing goes through, at least: more than any cache holds
    kv_dtype: torch.dtype | None = None  # of the pages; default: `dtype`

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's keys and values."""
        return 2 * self.kv_heads * self.dim * (self.kv_dtype or self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Scene:
    """A step over pages in random order: queries `[tokens, heads, dim]`, layers of keys and values."""

    query: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    rows: PagedRows
    scale: float

    def call(self, layer: int) -> torch.Tensor:
        return paged_attention(self.query, *self.layers[layer % len(self.layers)], self.rows, scale=self.scale)


def make_scene(scale: Scale, lens: list[int], contexts: list[int]) -> Scene:
    """Rows of so many queries and slots; as many layers as it takes to read `layer_bytes`."""
    size = scale.page_size
    counts = np.array([-(-context // size) for context in contexts])
    pages = np.random.default_rng(0).permutation(int(counts.sum())) + 1
    table = np.zeros((len(lens), int(counts.max())), np.int64)
    table[np.arange(table.shape[1]) < counts[:, None]] = pages
    lengths = np.array(lens, np.int64)
    decodes = len(lens) if (lengths == 1).all() else 0
    slots = torch.zeros(int(lengths.sum()), dtype=torch.long, device=scale.device)
    rows = PagedRows(size, decodes, lengths, np.array(contexts, np.int64), table, slots, grouped=False)
    layers = max(1, -(-scale.layer_bytes // (sum(contexts) * scale.slot_bytes)))
    options = {"dtype": scale.dtype, "device": scale.device}
    shape = (len(pages) + 1, scale.kv_heads, size, scale.dim)
    stored = scale.kv_dtype or scale.dtype
    made = [tuple(narrowed(torch.randn(shape, **options), stored) for _ in range(2)) for _ in range(layers)]
    query = torch.randn(int(lengths.sum()), scale.heads, scale.dim, **options)
    return Scene(query, made, rows, scale.dim**-0.5)


def seconds_of(run: Callable[[int], Any], scale: Scale, calls: int) -> float:
    """Seconds of one call, over `calls` of them in a CUDA graph, replayed: the host takes no part. Median."""
    run(0)  # compiles, and makes what a step's layers share
    if torch.device(scale.device).type != "cuda":
        begun = time.perf_counter()
        run(0)
        return time.perf_counter() - begun
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(call)
    graph.replay()
    times = []
    for _ in range(scale.repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def host_seconds(scene: Scene, scale: Scale, calls: int = 50) -> float:
    """Seconds that the host needs to launch one layer's attention."""
    scene.call(0)
    if torch.device(scale.device).type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        scene.call(0)
    seconds = (time.perf_counter() - begun) / calls
    if torch.device(scale.device).type == "cuda":
        torch.cuda.synchronize()
    return seconds


def ceilings(scale: Scale) -> dict[str, float]:
    """Bytes a second of a copy (read and written; the faster of two ways), operations a second of a large product."""
    source = torch.empty(scale.copy_bytes // 8, dtype=torch.float32, device=scale.device)
    target = torch.empty_like(source)
    ways = (lambda _: target.copy_(source), lambda _: torch.neg(source, out=target))
    copied = min(seconds_of(way, scale, 4) for way in ways)
    n = scale.matmul
    left, right = (torch.randn(n, n, dtype=scale.dtype, device=scale.device) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = seconds_of(lambda _: torch.mm(left, right, out=product), scale, 8)
    return {"copy_bytes_per_second": 2 * source.nbytes / copied, "matmul_flops": 2 * n**3 / multiplied}


def measure_decode(scale: Scale, rows: int, context: int, copy: float) -> dict[str, Any]:
    """One query a row: bytes of KV a second, and their share of a copy's."""
    scene = make_scene(scale, [1] * rows, [context] * rows)
    seconds = seconds_of(scene.call, scale, max(4, len(scene.layers)))
    rate = rows * context * scale.slot_bytes / seconds
    return {
        "rows": rows,
        "context": context,
        "seconds": seconds,
        "bytes_per_second": rate,
        "share_of_copy": rate / copy,
        "host_seconds": host_seconds(scene, scale),
        **errors(scene, scale),
    }


def measure_prefill(scale: Scale, matmul: float) -> dict[str, Any]:
    """A prompt without history, against torch's attention over contiguous KV."""
    n = scale.prefill
    scene = make_scene(scale, [n], [n])
    flops = 2 * n * n * scale.heads * scale.dim  # of the causal half of two products
    seconds = seconds_of(scene.call, scale, 4)
    out = {"tokens": n, "seconds": seconds, "flops": flops / seconds, "share_of_matmul": flops / seconds / matmul}
    query, key, value = _dense(scene, 0)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                peer = seconds_of(lambda _: _sdpa(query, key, value, scene.scale), scale, 4)
        except RuntimeError as error:
            out[f"sdpa_{name}"] = {"skipped": str(error)[:200]}
            continue
        out[f"sdpa_{name}"] = {"seconds": peer, "flops": flops / peer, "our_time_over_its": seconds / peer}
    return {**out, **errors(scene, scale)}


def measure_verify(scale: Scale) -> dict[str, Any]:
    """Several queries a row, over the time of one query a row."""
    rows, tokens, context = scale.verify
    times = {}
    for count in (1, tokens):
        scene = make_scene(scale, [count] * rows, [context] * rows)
        times[count] = seconds_of(scene.call, scale, max(4, len(scene.layers)))
        found = errors(scene, scale)
        del scene
    ratio = times[tokens] / times[1]
    return {"rows": rows, "tokens": tokens, "context": context, "seconds": times[tokens], "over_decode": ratio, **found}


def measure_shared(scale: Scale) -> dict[str, Any]:
    """Rows that have their first pages in common: what they share read once for several, over read by each."""
    rows, context, common = scale.shared
    scene = make_scene(scale, [1] * rows, [context] * rows)
    scene.rows.page_table[:, : common // scale.page_size] = scene.rows.page_table[0, : common // scale.page_size]
    both = [replace(scene, rows=replace(scene.rows, grouped=grouped, _derived={})) for grouped in (True, False)]
    grouped, ungrouped = (seconds_of(one.call, scale, 4) for one in both)
    equal = torch.equal(*(one.call(0) for one in both))
    sizes = {"rows": rows, "context": context, "shared": common}
    return {**sizes, "seconds": grouped, "ungrouped_seconds": ungrouped, "ratio": grouped / ungrouped, "equal": equal}


def errors(scene: Scene, scale: Scale) -> dict[str, float]:
    """Largest error of the first row against float64, over the largest value; and that of torch's own attention."""
    query, key, value = _dense(scene, 0)
    count = query.shape[1]
    got = scene.call(0)[:count].transpose(0, 1).double()
    exact, peer = [], []
    for head in range(scale.heads):
        own = head // (scale.heads // scale.kv_heads)
        one = query[head : head + 1], key[own : own + 1], value[own : own + 1]
        exact.append(_sdpa(*(t.double() for t in one), scene.scale))
        peer.append(_sdpa(*one, scene.scale))
    exact, peer = torch.cat(exact), torch.cat(peer).double()
    largest = exact.abs().max()
    return {
        "relative_error": float((got - exact).abs().max() / largest),
        "sdpa_relative_error": float((peer - exact).abs().max() / largest),
    }


def _dense(scene: Scene, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one row and of the first layer: `[heads, n, dim]`, contiguous."""
    rows = scene.rows
    context, count = int(rows.context_lens[row]), int(rows.query_lens[row])
    start = int(rows.query_lens[:row].sum())
    index = torch.from_numpy(rows.page_table[row, : -(-context // rows.page_size)]).to(scene.query.device)
    parts = []
    for pages in scene.layers[0]:
        taken = selected(pages, index).to(scene.query.dtype).transpose(0, 1)
        parts.append(taken.reshape(pages.shape[1], -1, pages.shape[-1])[:, :context].contiguous())
    return scene.query[start : start + count].transpose(0, 1).contiguous(), *parts


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Torch's attention, causal at the end: `[heads, n, dim]` over `[kv_heads, context, dim]`."""
    count, context, mask = query.shape[1], key.shape[1], None
    if 1 < count < context:
        mask = torch.ones(count, context, dtype=torch.bool, device=query.device).tril(context - count)
    return F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=count == context > 1,
        scale=scale,
        enable_gqa=True,
    )[0]


def run_kernels(scale: Scale | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """All of it. A share is of the ceiling that was measured in the same run.

    Returns:
        A report: ceilings, decodes (also of KV in fp8), sweep over rows, prefill, verification, a shared prefix.
    """
    scale, progress = scale or Scale(), progress or Progress()
    progress.plan(4 + 2 * len(scale.decodes) + len(scale.sweep))

    def done(note: str, make: Callable[[], Any]) -> Any:
        progress.note(note)
        result = make()
        if torch.device(scale.device).type == "cuda":
            torch.cuda.empty_cache()
        progress.done()
        return result

    found = done("ceilings", lambda: ceilings(scale))
    copy, matmul = found["copy_bytes_per_second"], found["matmul_flops"]
    chosen, why = choose_backend("auto", torch.device(scale.device).type)
    decodes = [done(f"decode {r} × {c}", lambda r=r, c=c: measure_decode(scale, r, c, copy)) for r, c in scale.decodes]
    narrow = replace(scale, kv_dtype=FP8)
    fp8 = [done(f"fp8 {r} × {c}", lambda r=r, c=c: measure_decode(narrow, r, c, copy)) for r, c in scale.decodes]
    sweep = [
        done(f"decode {r} rows", lambda r=r: measure_decode(scale, r, math.ceil(scale.sweep_slots / r), copy))
        for r in scale.sweep
    ]
    return {
        "benchmark": "kernels",
        "backend": chosen,
        "backend_reason": why,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "heads": [scale.heads, scale.kv_heads, scale.dim],
        "page_size": scale.page_size,
        "ceilings": found,
        "decode": decodes,
        "decode_fp8": fp8,
        "sweep": sweep,
        "prefill": done("prefill", lambda: measure_prefill(scale, matmul)),
        "verify": done("verification", lambda: measure_verify(scale)),
        "shared": done("a shared prefix", lambda: measure_shared(scale)),
        "machine": machine(),
    }
