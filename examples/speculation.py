"""Drafts verified in one forward: the same tokens, sooner. With a draft model, from the text itself, from texts before.

python examples/speculation.py [MODEL DRAFT]
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged
from hf_paged import Engine, SamplingParams, SpeculationConfig

MODELS = Path(__file__).parent / "models"
TARGET, DRAFT = sys.argv[1:3] if len(sys.argv) > 2 else (str(MODELS / "target"), str(MODELS / "draft"))


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    model, draft = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (TARGET, DRAFT))
    prompts = [f"Question: Tom has {n} apples and eats {n - 2}. How many are left?\nAnswer:" for n in range(4, 8)]

    # Through generate: any batch size, greedy or sampled.
    hf_paged.enable()
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    plain = model.generate(**batch, max_new_tokens=32)
    assisted = model.generate(**batch, max_new_tokens=32, cache_implementation="paged", assistant_model=draft)
    print("generate with an assistant gives the same tokens:", assisted.tolist() == plain.tolist())

    # The engine, with each way to draft.
    params = [SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True) for _ in prompts]
    wanted = None
    for method in ("off", "lookup", "suffix", "draft", "auto"):
        config = SpeculationConfig(method=method, max_draft_tokens=8, tree_width=4)
        drafting = draft if method in ("draft", "auto") else None
        with Engine(model, tokenizer=tokenizer, draft_model=drafting, speculation=config) as engine:
            engine.generate(prompts[0], params[0])  # warm
            begun = time.perf_counter()
            tokens = [engine.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
            seconds, stats = time.perf_counter() - begun, engine.speculation_stats()
            wanted = wanted or tokens
            print(
                f"{method:7} {seconds:5.2f} s, {stats.tokens_per_row:.1f} tokens a forward, "
                f"{stats.accepted} of {stats.proposed} drafts accepted, same tokens: {tokens == wanted}"
            )


if __name__ == "__main__":
    main()
