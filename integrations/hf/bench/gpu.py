"""`hf-paged bench gpu`: what a GPU makes of whole models of random weights: tokens a second, shares of ceilings."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_paged.integrations.bench.kernels import Scale, ceilings
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.peers import HfContinuous, HfGenerate
from hf_paged.integrations.bench.throughput import Progress
from hf_paged.integrations.bench.workload import Workload
from hf_paged.integrations.cuda_step import DecodeStepper
from hf_paged.integrations.lean import LeanForward

# Hidden size, MLP size, layers, heads, KV heads, vocabulary, tied embeddings; heads have 128 elements but for `DIMS`.
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "qwen3-0.6b": ("Qwen3", 1024, 3072, 28, 16, 8, 151936, True),
    "qwen3-8b": ("Qwen3", 4096, 12288, 36, 32, 8, 151936, False),
    "llama-3.1-8b": ("Llama", 4096, 14336, 32, 32, 8, 128256, False),
    "gemma-2-2b": ("Gemma2", 2304, 9216, 26, 8, 4, 256000, True),
    "phi-3-mini": ("Phi3", 3072, 8192, 32, 32, 32, 32064, False),
    "tiny": ("Qwen3", 64, 128, 2, 4, 2, 512, True),
    "tiny-gemma": ("Gemma2", 64, 128, 2, 4, 2, 512, True),
}
DIMS = {"gemma-2-2b": 256, "phi-3-mini": 96, "tiny": 32, "tiny-gemma": 32}
STEP = (32, 1024)  # rows and context of the step that is held against the roofline
STEPS = 96  # of it


@dataclass(frozen=True)
class Load:
    """Requests to a model of a shape, tokens in and out of each; `peers` answer the first `peer_requests` of them."""

    shape: str
    requests: int
    prompt: int
    output: int
    peers: tuple[str, ...] = ()
    peer_requests: int = 64

    def workload(self, vocab: int, requests: int | None = None) -> Workload:
        """Random prompts."""
        count = min(requests or self.requests, self.requests)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1, vocab, (count, self.prompt), generator=generator).tolist()
        return Workload(tuple(map(tuple, prompts)), (self.output,) * count)


LOADS = (
    Load("qwen3-0.6b", 64, 256, 128, ("hf", "hf-cb")),
    Load("qwen3-8b", 256, 1024, 1024),
    Load("llama-3.1-8b", 32, 1024, 128),
    Load("gemma-2-2b", 32, 1024, 128),
    Load("phi-3-mini", 32, 1024, 128),
)


def make_model(shape: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model of this shape with random weights, made on the device."""
    import transformers

    family, hidden, mlp, layers, heads, kv_heads, vocab, tied = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=DIMS.get(shape, 128),
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return getattr(transformers, f"{family}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(before)


def _settings(greedy: bool, index: int, output: int) -> Any:
    from hf_paged import SamplingParams

    how = {"temperature": 0.0} if greedy else {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": index}
    return SamplingParams(max_tokens=output, ignore_eos=True, prefix_caching=False, **how)


def measure_engine(engine: Any, load: Workload, greedy: bool) -> dict[str, Any]:
    """Tokens a second over the whole workload, warm."""
    prompts = [list(prompt) for prompt in load.prompts]
    warm = [_settings(greedy, i, min(12, n)) for i, n in enumerate(load.lengths)]
    engine.generate(prompts, warm, raise_errors=True)
    engine.reset_stats()
    begun = time.perf_counter()
    engine.generate(prompts, [_settings(greedy, i, n) for i, n in enumerate(load.lengths)], raise_errors=True)
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "tokens_per_second": load.tokens / seconds,
        "steps": engine.stats().steps,
        "preemptions": engine.stats().preemptions,
    }


def measure_step(engine: Any, vocab: int, copy: float) -> dict[str, Any]:
    """A decode step of `STEP` rows and context, over the time in which weights and KV could be copied.

    Host gaps: the share of the time from burst to burst in which the device has nothing queued.
    """
    rows, context = STEP
    load = Load("", rows, context, STEPS + 8).workload(vocab)
    for prompt, n in zip(load.prompts, load.lengths, strict=True):
        engine.submit(list(prompt), _settings(True, 0, n))
    core, stepper = engine.core, _graphs(engine)
    while not (len(core.roster.running) == rows and all(row.output_ids for row in core.roster.running)):
        engine.step()
    engine.step()  # captures
    if stepper is not None:
        stepper.clock = []
    before, contexts = core.recorder.counts["steps"], []
    _synchronize(engine)
    begun = time.perf_counter()
    while len(core.roster.running) == rows:
        contexts.append(sum(len(row.tokens) for row in core.roster.running) / rows)
        engine.step()
    _synchronize(engine)
    wall, steps = time.perf_counter() - begun, core.recorder.counts["steps"] - before
    embedding = engine.target().get_input_embeddings().weight
    parameters = {id(p): p for p in engine.target().parameters()}.values()
    tied = engine.target().get_output_embeddings().weight is embedding
    weights = sum(p.nbytes for p in parameters) - (0 if tied else embedding.nbytes)
    store = engine.store
    slots = rows * (sum(contexts) / len(contexts) + steps / len(contexts) / 2)
    roofline = (weights + slots * store.bytes_per_page / store.page_size) / copy
    out = {"rows": rows, "context": context, "steps": steps, "seconds": wall / steps, "roofline_seconds": roofline}
    out["over_roofline"] = out["seconds"] / roofline
    if stepper is not None and stepper.clock:
        busy = sum(begin.elapsed_time(end) for begin, end, _ in stepper.clock) / 1e3
        out |= {"device_seconds": busy / steps, "host_gap": 1 - busy / wall}
        out["device_over_roofline"] = out["device_seconds"] / roofline
        stepper.clock = None
    return out


def _graphs(engine: Any) -> DecodeStepper | None:
    """What steps in CUDA graphs, if anything does."""
    return engine.stepper if isinstance(engine.stepper, DecodeStepper) else None


def _synchronize(engine: Any) -> None:
    if engine.facts.device.type == "cuda":
        torch.cuda.synchronize()


def measure_peers(model: Any, load: Load, vocab: int) -> dict[str, Any]:
    """Tokens a second of transformers' own ways: `generate` in batches of 32, and continuous batching."""
    work, made = load.workload(vocab, load.peer_requests), {}
    kinds = {"hf": lambda: HfGenerate(model, 0, (32,)), "hf-cb": lambda: HfContinuous(model)}
    for name in load.peers:
        try:
            peer = kinds[name]()
            peer.warm(work.only(range(min(32, len(work)))))
            run = peer.run(work)
            made[name] = {"seconds": run.seconds, "tokens_per_second": work.tokens / run.seconds}
        except Exception as error:  # a peer that fails is told of; the others count
            made[name] = {"skipped": f"{type(error).__name__}: {error}"[:300]}
        _free()
    return made


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_here(
    model: Any, load: Load, vocab: int, copy: float, progress: Progress, compiled: bool = False
) -> dict[str, Any]:
    """Its step, and the engine's throughput greedy and sampled; whether a leaner forward takes its own's place.

    `compiled`: with its blocks compiled, in `compile_seconds` or less.
    """
    from hf_paged import Engine

    how, out = " compiled" if compiled else "", {}
    count = max(load.requests, STEP[0])
    with Engine(model, memory_fraction=0.85, max_sequences=count, compile=compiled) as engine:
        if compiled:
            begun = time.perf_counter()
            measure_step(engine, vocab, copy)
            out["compile_seconds"] = time.perf_counter() - begun
        progress.note(f"{load.shape}: a step{how}")
        out["step"] = measure_step(engine, vocab, copy)
        for name, greedy in (("greedy", True), ("sampled", False)):
            progress.note(f"{load.shape}: {name}{how}")
            out[name] = measure_engine(engine, load.workload(vocab), greedy)
        stepper = _graphs(engine)
        out["graphs"] = stepper is not None and stepper.failure is None
        out["lean"] = isinstance(engine.forward.run, LeanForward)
    return out


def measure(load: Load, copy: float, device: str, dtype: torch.dtype, progress: Progress) -> dict[str, Any]:
    """One model: `measure_here`, compiled as well where its own forward runs, and the peers."""
    vocab = SHAPES[load.shape][6]
    progress.note(f"{load.shape}: weights")
    model = make_model(load.shape, device, dtype)
    out: dict[str, Any] = {"shape": load.shape, "requests": load.requests, "in": load.prompt, "out": load.output}
    try:
        out |= measure_here(model, load, vocab, copy, progress)
        _free()
        if not out["lean"]:
            out["compiled"] = measure_here(model, load, vocab, copy, progress, compiled=True)
            _free()
        progress.note(f"{load.shape}: peers")
        out["peers"] = measure_peers(model, load, vocab)
    finally:
        del model
        _free()
    progress.done()
    return out


def run_gpu(
    loads: Sequence[Load] = LOADS,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """All loads, with the ceilings of the same run."""
    progress = progress or Progress()
    progress.plan(1 + len(loads))
    progress.note("ceilings")
    found = ceilings(scale or Scale(device=device, dtype=dtype))
    _free()
    progress.done()
    models = [measure(load, found["copy_bytes_per_second"], device, dtype, progress) for load in loads]
    return {
        "benchmark": "gpu",
        "dtype": str(dtype).removeprefix("torch."),
        "ceilings": found,
        "models": models,
        "machine": machine(),
    }
