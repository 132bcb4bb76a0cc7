"""The call that people already write: `model.generate(..., cache_implementation="paged")`, alone and in a pipeline.

python examples/quickstart.py [MODEL]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_paged

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "models" / "target")
PROMPTS = [
    "Question: A box holds 12 eggs. Nina buys 3 boxes and uses 7 eggs. How many eggs are left?\nAnswer:",
    "Question: A train goes 60 miles an hour for 2 hours. How far does it go?\nAnswer:",
    "def add(a, b):\n",
]


def main() -> None:
    hf_paged.enable()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    # A left-padded batch, as always. The rows come back padded on the right, the prompt first.
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    paged = model.generate(**batch, max_new_tokens=48, do_sample=False, cache_implementation="paged")
    plain = model.generate(**batch, max_new_tokens=48, do_sample=False)
    print("same tokens as transformers' own loop:", torch.equal(paged, plain))
    for row in tokenizer.batch_decode(paged[:, batch.input_ids.shape[1] :], skip_special_tokens=True):
        print("-", row.strip().replace("\n", " / "))

    # Sampling is repeatable: a token depends on the model, its prompt, the parameters and the seed, on nothing else.
    torch.manual_seed(0)
    first = model.generate(**batch, do_sample=True, top_p=0.9, max_new_tokens=16, cache_implementation="paged")
    torch.manual_seed(0)
    again = model.generate(**batch, do_sample=True, top_p=0.9, max_new_tokens=16, cache_implementation="paged")
    print("same seed, same tokens:", torch.equal(first, again))

    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = write(PROMPTS, batch_size=3, max_new_tokens=16, cache_implementation="paged", return_full_text=False)
    print("pipeline:", [answer[0]["generated_text"].strip() for answer in answers])
    hf_paged.disable()


if __name__ == "__main__":
    main()
