"""The engine itself: many requests of different make in one continuous batch, streaming, cancelling.

python examples/engine.py [MODEL]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import Engine, SamplingParams

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "target")


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with Engine(model, tokenizer=tokenizer, page_size=16, max_sequences=64) as engine:
        # One list, parameters for each.
        prompts = [f"Question: What is {a} + {a + 1}?\nAnswer:" for a in range(2, 6)]
        params = [SamplingParams(temperature=0.0, max_tokens=24, stop="\n") for _ in prompts]
        params[-1] = SamplingParams(n=2, temperature=0.8, top_p=0.95, max_tokens=24, seed=7, logprobs=1)
        for result in engine.generate(prompts, params):
            for output in result.outputs:
                print(f"{result.request_id}.{output.index} [{output.finish_reason}] {output.text!r}")

        # Tokens as they come.
        for event in engine.stream("def fibonacci(n):\n", SamplingParams(temperature=0.0, max_tokens=32)):
            print(event.text, end="", flush=True)
        print()

        # The loop in your own hands.
        kept = engine.submit(prompts[0], SamplingParams(temperature=0.0, max_tokens=8))
        dropped = engine.submit(prompts[1], SamplingParams(temperature=0.0, max_tokens=1000))
        while engine.has_work:
            for result in engine.step():
                print(result.request_id, result.outputs[0].finish_reason, result.outputs[0].token_ids[:8])
            engine.cancel(dropped)
        stats = engine.stats()
        print(f"{kept} is done; {stats.generated_tokens} tokens in {stats.steps} steps, KV waste {stats.kv_waste:.1%}")


if __name__ == "__main__":
    main()
