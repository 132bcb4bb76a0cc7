"""Prefixes computed once: under one header, over turns of a chat, between tenants, from one process to the next.

python examples/prefix_sharing.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from hf_paged import Engine, SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "target")
HEADER = "".join(f"Question: What is {a} + {b}?\nAnswer: {a + b}\n\n" for a in range(2, 8) for b in range(3, 6))


def report(what: str, results: list) -> None:
    cached = sum(result.metrics.cached_tokens for result in results)
    total = sum(len(result.prompt_token_ids) for result in results)
    print(f"{what}: {total - cached} of {total} prompt tokens were computed")


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    questions = [f"{HEADER}Question: What is {a} + 9?\nAnswer:" for a in range(10, 26)]
    saved = Path(tempfile.mkdtemp()) / "header.safetensors"

    with Engine(model, tokenizer=tokenizer) as engine:
        results = engine.generate(questions, greedy)
        report("16 questions under one header", results)
        chat = results[0].prompt_token_ids + results[0].outputs[0].token_ids
        report(
            "the next turn of one of them", engine.generate([chat + tokenizer("\n\nQuestion:")["input_ids"]], greedy)
        )
        other = SamplingParams(temperature=0.0, max_tokens=16, cache_salt="another tenant")
        report("the same question under another salt", engine.generate(questions[:1], other))
        print(engine.tree_summary(limit=3))
        engine.save_prefixes(saved)

    with Engine(model, tokenizer=tokenizer) as engine:
        print(f"{engine.load_prefixes(saved)} tokens come back from {saved.stat().st_size / 1e6:.1f} MB")
        report("the questions again", engine.generate(questions, greedy))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)  # an optimizer's step would do
        report("after a change of the weights", engine.generate(questions[:1], greedy))

    # Calls of generate share too: the tree belongs to the model's engine.
    hf_paged.enable()
    batch = tokenizer(questions[:2], return_tensors="pt", padding=True)
    for arguments in ({}, {}, {"prefix_caching": False}, {"cache_salt": "another tenant"}):
        ids = model.generate(**batch, max_new_tokens=4, cache_implementation="paged", do_sample=False, **arguments)
        print(f"generate with {arguments or 'no argument more'}: {tokenizer.decode(ids[0, -4:])!r}")


if __name__ == "__main__":
    main()
