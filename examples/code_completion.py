r"""HumanEval-style completion, with and without a draft model: the same rows, fewer forwards.

python examples/code_completion.py [MODEL DRAFT [DATASET.jsonl]]

DATASET has a column `prompt`, as HumanEval.jsonl.gz has; by default a dozen functions that lie here. The same from a
shell:

hf-paged eval --dataset examples/data/functions.jsonl --template '{{ prompt.rstrip() }}' --draft examples/models/draft \
    --max-tokens 64 --stop '\ndef ' --stop '\nclass ' --out out/functions
"""

import sys
import tempfile
from pathlib import Path

from hf_paged.integrations.datasets import generate_dataset, read_rows

HERE = Path(__file__).parent
MODELS = [str(HERE / "models" / name) for name in ("target", "draft")]
MODEL, DRAFT = sys.argv[1:3] if len(sys.argv) > 2 else MODELS
DATASET = sys.argv[3] if len(sys.argv) > 3 else str(HERE / "data" / "functions.jsonl")
STOP = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#")


def main() -> None:
    folder, found = Path(tempfile.mkdtemp()), {}
    for name, draft in (("plain", None), ("drafted", DRAFT)):
        # Few rows at a time, as for someone who waits: that is where drafts pay.
        summary = generate_dataset(
            MODEL,
            DATASET,
            folder / name,
            # Many tokenizers join a newline with the indentation behind it: a prompt had better not end between them.
            template="{{ prompt.rstrip() }}",
            sampling={"stop": STOP},
            max_tokens=64,
            draft_model=draft,
            max_sequences=4,
        )
        found[name] = sorted(read_rows(folder / name), key=lambda row: row["row"])
        taken = "" if summary.acceptance is None else f", {summary.acceptance:.0%} of drafts taken"
        print(f"{name}: {summary.rows} rows, {summary.generated_tokens} tokens in {summary.steps} forwards{taken}")
    print("the same rows:", found["plain"] == found["drafted"])
    row = found["drafted"][0]
    print(row["prompt"] + row["text"].rstrip())


if __name__ == "__main__":
    main()
