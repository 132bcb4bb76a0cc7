r"""Few-shot GSM8K: a template file with four worked problems, every answer scored, a run that is stopped and goes on.

python examples/few_shot_gsm8k.py [MODEL [DATASET.jsonl]]

DATASET is GSM8K's own file or hub name where you have it; by default 24 problems of that kind that lie here. The same
from a shell:

hf-paged eval --dataset examples/data/word_problems.jsonl --template examples/data/few_shot.jinja --max-tokens 96 \
    --stop '\n\n' --out out/gsm8k
"""

import re
import sys
import tempfile
from pathlib import Path

from hf_paged.integrations.datasets import generate_dataset, read_rows
from hf_paged.integrations.datasets.source import open_source

HERE = Path(__file__).parent
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "models" / "target")
DATASET = sys.argv[2] if len(sys.argv) > 2 else str(HERE / "data" / "word_problems.jsonl")


def number(text: str) -> str | None:
    """What stands behind GSM8K's ####."""
    found = re.search(r"####\s*\$?(-?[\d.,]+)", str(text))
    return found[1].replace(",", "").rstrip(".") if found else None


def main() -> None:
    out = Path(tempfile.mkdtemp()) / "gsm8k"
    common = dict(template=HERE / "data" / "few_shot.jinja", sampling={"stop": "\n\n"}, max_tokens=96, seed=0)

    first = generate_dataset(MODEL, DATASET, out, limit=10, **common)
    print(f"{first.rows} rows, {first.hit_rate:.0%} of prompt tokens cached")
    rest = generate_dataset(MODEL, DATASET, out, **common)
    print(f"the same call without the limit: {rest.rows_before} rows were there, {rest.rows} are new")

    truth = {i: row["answer"] for i, row in open_source(DATASET).rows()}
    answers = {row["row"]: row["text"] for row in read_rows(out)}
    right = sum(number(text) == (number(truth[i]) or str(truth[i])) for i, text in answers.items())
    print(f"{right} of {len(answers)} right. Row 1: {answers[1].strip()!r}")

    try:
        generate_dataset(MODEL, DATASET, out, **common | {"max_tokens": 32})
    except ValueError as refused:
        print(f"refused: {str(refused).split('. ')[-1]}")


if __name__ == "__main__":
    main()
