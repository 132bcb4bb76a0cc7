"""A pipeline over a dataset, with the default cache and on the engine: the same texts.

python examples/pipeline_dataset.py [MODEL]
"""

import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_paged

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "target")


def main() -> None:
    rows = load_dataset("json", data_files=str(HERE / "data" / "prompts.jsonl"), split="train")
    rows = rows.map(lambda row: {"prompt": f"Question: {row['question']}\nAnswer:"})
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    settings = dict(max_new_tokens=48, do_sample=False, return_full_text=False, batch_size=16)

    begun = time.perf_counter()
    plain = list(pipe(KeyDataset(rows, "prompt"), **settings))
    static = time.perf_counter() - begun

    hf_paged.enable()
    begun, paged = time.perf_counter(), []
    # Results come in order while further rows are read: nothing holds the whole dataset.
    for row, result in zip(
        rows, pipe(KeyDataset(rows, "prompt"), **settings, cache_implementation="paged"), strict=True
    ):
        if len(paged) < 3:
            print(f"{row['question']}\n   {result[0]['generated_text'].strip()!r}")
        paged.append(result)
    continuous = time.perf_counter() - begun
    print(f"{len(rows)} rows: {static:.1f} s in batches of 16, {continuous:.1f} s on the engine, which is made first")
    print("the same texts" if paged == plain else "the texts differ")


if __name__ == "__main__":
    main()
