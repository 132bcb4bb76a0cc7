"""One job over a dataset in two processes, each with its own engine and every other row; the rows are those of one.

python examples/two_processes.py      launches two, then compares with one

OUT=out/two accelerate launch --multi_gpu --num_processes 2 examples/two_processes.py

`--multi_gpu` names accelerate's launcher of several processes: without GPUs they run on CPUs (with `--cpu` accelerate
starts them by mpirun only). The command line does the same:

accelerate launch --multi_gpu --num_processes 2 -m hf_paged eval --dataset examples/data/prompts.jsonl \
    --template 'Question: {{ question }}\\nAnswer:' --max-tokens 32 --out out/two
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_paged.integrations.datasets import generate_dataset, read_rows
from hf_paged.integrations.datasets.processes import launched

HERE = Path(__file__).parent
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def job(out: str) -> None:
    """What both processes run; the first one's summary is of all."""
    data, template = HERE / "data" / "prompts.jsonl", "Question: {{ question }}\nAnswer:"
    summary = generate_dataset(str(HERE / "models" / "target"), str(data), out, template=template, max_tokens=32)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{summary.rows} rows, {summary.tokens_per_second:.0f} tokens/s")


def main() -> None:
    if launched():
        job(os.environ["OUT"])
        return
    with tempfile.TemporaryDirectory() as folder:  # run as a plain script: launch it twice, and compare
        two, one = f"{folder}/two", f"{folder}/one"
        subprocess.run([sys.executable, "-m", *LAUNCH, __file__], check=True, env=os.environ | {"OUT": two})
        job(one)
        files = [path.name for path in sorted(Path(two).glob("part-*"))]
        same = sorted(read_rows(two), key=_row) == sorted(read_rows(one), key=_row)
        print(f"{' and '.join(files)} together hold the rows of one process: {same}")


def _row(row: dict) -> int:
    return row["row"]


if __name__ == "__main__":
    main()
