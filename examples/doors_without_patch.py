"""Two doors that patch nothing: `custom_generate`, and `PagedCache` for any strategy of transformers' own loop.

python examples/doors_without_patch.py [MODEL]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "target")


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    batch = tokenizer(["import os\n", "Question: What is 2 + 2?\nAnswer:"], return_tensors="pt", padding=True)

    ours = model.generate(**batch, max_new_tokens=24, do_sample=False, custom_generate=hf_paged.generate)
    plain = model.generate(**batch, max_new_tokens=24, do_sample=False)
    print("custom_generate, same tokens:", torch.equal(ours, plain))

    cache = hf_paged.PagedCache(model.config)
    beams = model.generate(**batch, max_new_tokens=24, num_beams=4, past_key_values=cache)
    plain = model.generate(**batch, max_new_tokens=24, num_beams=4)
    print("beam search over PagedCache, same tokens:", torch.equal(beams, plain))
    print(f"pages in use: {cache.memory.pool.used} for {beams.shape[0] * 4} beams of up to {beams.shape[1]} tokens")


if __name__ == "__main__":
    main()
