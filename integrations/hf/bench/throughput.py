"""`hf-paged bench throughput`: many requests at once, engines side by side, tokens compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.bench.equality import compare, generate_alone
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.models import Loaded, kv_bytes_per_token
from hf_paged.integrations.bench.peers import HfContinuous, HfGenerate, Paged, Peer
from hf_paged.integrations.bench.result import summary
from hf_paged.integrations.bench.turns import take_turns
from hf_paged.integrations.bench.vllm_peer import NoVllm, Vllm
from hf_paged.integrations.bench.workload import Workload

PEERS = ("hf", "hf-cb", "vllm")


class Progress:
    """How a long job tells where it is; this one tells nobody. The command line has one with a bar."""

    def plan(self, steps: int) -> None:
        """So many steps are to come."""

    def note(self, text: str) -> None:
        """This begins now."""

    def done(self) -> None:
        """A step is done."""


def check_peers(text: str, known: Sequence[str] = PEERS) -> list[str]:
    """Split a list of peers with commas.

    Raises:
        BadInput: on a name that is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BadInput(f"--peers {text}: {name!r} is not one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def make_vllm(loaded: Loaded, load: Workload, python: str | None, speculation: dict[str, Any] | None = None) -> Vllm:
    """Start the vLLM worker for a workload.

    Args:
        speculation: vLLM's `speculative_config`.

    Raises:
        BadInput: without an interpreter. NoVllm: if it has no vLLM.
    """
    if python is None:
        raise BadInput("peer vllm needs --vllm-python: an interpreter that can import vllm")
    dtype = loaded.model.dtype
    kv = sum(map(len, load.prompts)) + load.tokens
    longest = min(loaded.limit or load.longest, -(-load.longest // 256) * 256)
    name = str(dtype).removeprefix("torch.")
    kv_bytes = kv * kv_bytes_per_token(loaded.model.config, dtype)
    return Vllm(python, loaded.name, name, longest, kv_bytes, speculation)


def make_peers(
    names: Sequence[str], loaded: Loaded, load: Workload, vllm_python: str | None, settings: dict[str, Any]
) -> tuple[list[Peer], dict[str, str]]:
    """Ours first, then the peers by name; and why some cannot run."""
    makers: dict[str, Callable[[], Peer]] = {
        "hf": lambda: HfGenerate(loaded.model, loaded.pad_id),
        "hf-cb": lambda: HfContinuous(loaded.model),
        "vllm": lambda: make_vllm(loaded, load, vllm_python),
    }
    if "vllm" in names and vllm_python is None:
        raise BadInput("peer vllm needs --vllm-python: an interpreter that can import vllm")
    peers: list[Peer] = [Paged(loaded.model, **settings)]
    skipped: dict[str, str] = {}
    try:
        for name in names:
            try:
                peers.append(makers[name]())
            except NoVllm as error:
                skipped[name] = str(error)
    except BaseException:
        for peer in peers:
            peer.close()
        raise
    return peers, skipped


@contextmanager
def without_end_token(model: Any):
    """Each request makes exactly its length: the model's own end-of-sequence id is out meanwhile."""
    config = model.generation_config
    saved, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = saved


def run_throughput(
    loaded: Loaded,
    load: Workload,
    names: Sequence[str],
    *,
    repeats: int,
    vllm_python: str | None = None,
    settings: dict[str, Any] | None = None,
    check_tokens: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time all engines on a workload, in turns, and compare their tokens with those of each row alone.

    Args:
        names: peers, see `PEERS`. repeats: rounds. settings: of hf_paged's engine. check_tokens: compare
        (slow).

    Returns:
        A report: `rows` (one an engine), `ratios` (hf_paged's tokens a second over each peer's), `skipped`
        and on what it ran.
    """
    progress = progress or Progress()
    with ExitStack() as stack:
        stack.enter_context(without_end_token(loaded.model))
        progress.note("starting the engines")
        peers, skipped = make_peers(names, loaded, load, vllm_python, settings or {})
        for peer in peers:
            stack.callback(peer.close)
        progress.plan(len(peers) * (1 + repeats) + (len(load) if check_tokens else 0))
        runs = take_turns(peers, load, repeats, progress.note, progress.done)
        rows = [summary(name, done) for name, done in runs.items()]
        if check_tokens:
            progress.note("tokens of each row alone")
            reference = generate_alone(loaded.model, load, loaded.pad_id, progress.done)
            for row, done in zip(rows, runs.values(), strict=True):
                row.update(_worst(loaded.model, load, reference, [run.tokens for run in done]))
    ours = rows[0]["tokens_per_second"]
    return {
        "benchmark": "throughput",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "requests": len(load),
        "prompt_tokens": sum(map(len, load.prompts)),
        "output_tokens": load.tokens,
        "repeats": repeats,
        "rows": rows,
        "ratios": {row["engine"]: ours / row["tokens_per_second"] for row in rows[1:]},
        "tokens_equal": rows[0].get("tokens_equal"),
        "skipped": skipped,
        "machine": machine(),
    }


def _worst(model: Any, load: Workload, reference: list[list[int]], runs: list[list[list[int]]]) -> dict[str, Any]:
    """The comparison of the run that differs most: a run that differs now and then is no equal one."""
    distinct = [run for number, run in enumerate(runs) if run not in runs[:number]]
    found = [compare(model, load, reference, run) for run in distinct]
    return max(found, key=lambda result: result["rows_differing"])
