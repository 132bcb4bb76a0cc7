"""What each process of `test_tensor_parallel.py` does: run by torchrun, writes what it saw to `OUT.RANK`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_paged
from hf_paged import Engine, SamplingParams
from hf_paged.integrations import sizing

PROMPTS = [[1, 17, 40, 40, 9], [1, 17, 40, 40, 9, 55, 60], [1, 3], [1, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=12)
CHANGED = "model.layers.1.mlp.up_proj.weight"


def load(path: str, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings).eval()


def engine_tokens(engine: Engine, params: Any) -> list[list[int]]:
    return [r.outputs[0].token_ids for r in engine.generate(PROMPTS, params, raise_errors=True)]


def cases(model: PreTrainedModel, draft: PreTrainedModel, rank: int) -> dict[str, Any]:
    """Tokens that one process and two must give alike; `rank` tells processes apart where they must not differ."""
    seen: dict[str, Any] = {}
    torch.manual_seed(7 + rank)
    engine = Engine(model, page_size=4)
    seen["mixed"] = engine_tokens(engine, [GREEDY, SAMPLED, GREEDY, SAMPLED])
    seen["again"] = engine_tokens(engine, SAMPLED)
    for name, speculation in {"adaptive": {}, "always": {"adaptive": False, "tree_width": 2}}.items():
        drafted = Engine(
            model, page_size=4, num_pages=40, draft_model=draft, speculation={"method": "auto"} | speculation
        )
        seen[name] = [engine_tokens(drafted, SAMPLED) for _ in range(3)]
    hf_paged.enable()
    ids = torch.tensor(PROMPTS[0])[None].repeat(3, 1)
    call = {"cache_implementation": "paged", "max_new_tokens": 9}
    seen["generate"] = model.generate(ids, **call).tolist()
    seen["generate, sampled"] = model.generate(ids, do_sample=True, top_k=20, **call).tolist()
    # In the first process the time is up at once.
    seen["max_time"] = model.generate(ids, max_time=1e-9 if rank == 0 else 1e9, **call).tolist()
    with torch.no_grad():
        model.get_parameter(CHANGED).data.mul_(3.0)
    seen["changed"] = engine_tokens(engine, GREEDY)
    return seen


def refusals(model: PreTrainedModel, path: str) -> list[str]:
    engine, said = Engine(model, num_pages=40), []
    for attempt in (
        lambda: Engine(model, disk_cache=f"{path}/kv"),
        lambda: engine.save_prefixes(f"{path}/prefixes"),
        lambda: engine.load_prefixes(f"{path}/prefixes"),
    ):
        try:
            attempt()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def diverge(model: PreTrainedModel, rank: int) -> list[str]:
    """What is said where processes ask for different things, and after that."""
    engine, said = Engine(model, num_pages=40), []
    for prompt in (PROMPTS[rank], PROMPTS[0]):
        try:
            engine.generate([prompt], GREEDY)
            said.append("nothing")
        except RuntimeError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def equal(target: str, draft: str) -> dict[str, Any]:
    model = load(target, tp_plan="auto")
    rank = dist.get_rank()
    sizing.available_memory = lambda: 2**24 >> rank
    seen = cases(model, load(draft), rank)
    seen["kv_heads"] = Engine(model, num_pages=8).facts.layers[0].kv_heads
    seen["pages"] = Engine(model).store.num_pages
    return seen | {"refused": refusals(model, target), "diverged": diverge(model, rank)}


def bundled(target: str, _: str) -> dict[str, Any]:
    model = load(target, tp_plan="auto")
    return {"tokens": engine_tokens(Engine(model, num_pages=64), [GREEDY, SAMPLED, GREEDY, SAMPLED])}


class Broken(Exception):
    pass


def failure(target: str, _: str) -> dict[str, Any]:
    """The second process fails inside the model, survives it, tries again, and leaves."""
    model = load(target, tp_plan="auto")
    engine, said, calls = Engine(model, num_pages=40), [], iter(range(100))

    def fail(*_: Any) -> None:
        if next(calls) == 3:
            raise Broken

    if dist.get_rank() == 1:
        model.model.layers[1].register_forward_pre_hook(fail)
    for _ in range(2):
        try:
            engine.generate(PROMPTS, GREEDY)
        except (Broken, RuntimeError) as error:
            said.append(type(error).__name__)
    return {"said": said}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out, *paths = sys.argv[1:]
    seen = {"equal": equal, "bundled": bundled, "failure": failure}[what](*paths)
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(seen, file)
