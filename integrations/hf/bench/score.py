"""`hf-paged bench score`: multiple choice under few-shot headers, by lm-evaluation-harness's `hf` and by `hf-paged`.

Both get the same requests through the same call of lm-eval's interface, `loglikelihood`: tokenising counts.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Any

from hf_paged.integrations.bench.data import BadInput, rows_of
from hf_paged.integrations.bench.machine import machine
from hf_paged.integrations.bench.models import Loaded
from hf_paged.integrations.bench.throughput import Progress

LETTERS = "ABCDEFGH"
HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"


def _text(row: dict[str, Any]) -> str:
    """A question as lm-eval's MMLU puts it, up to the answer."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question'].strip()}\n{choices}\nAnswer:"


def _checked(path: str, rows: Any, count: int | None) -> list[dict[str, Any]]:
    """Rows with `question`, `choices`, and `answer` as an index.

    Raises:
        BadInput: a row is of another kind, or there are too few.
    """
    found = []
    for number, row in enumerate(islice(rows, count), 1):
        missing = [name for name in ("question", "choices", "answer") if row.get(name) is None]
        if missing:
            raise BadInput(f"{path}: row {number} has no {missing[0]}; it has: {', '.join(row)}")
        answer = LETTERS.find(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
        if not isinstance(row["choices"], list) or not 0 <= answer < len(row["choices"]) <= len(LETTERS):
            raise BadInput(f"{path}: answer {row['answer']!r} of row {number} is none of its {row['choices']!r}")
        found.append(row | {"answer": answer, "subject": str(row.get("subject", "many things"))})
    if not found or (count is not None and len(found) < count):
        raise BadInput(f"{path}: {count or 'some'} rows were asked for and it holds {len(found)}")
    return found


def read_questions(path: str, shots: str | None, requests: int, num_shots: int) -> list[tuple[str, dict[str, Any]]]:
    """Each question with its context: the header of its subject, `num_shots` answered questions of it, the question.

    Raises:
        BadInput: a file that cannot be used.
    """
    examples: dict[str, list[str]] = defaultdict(list)
    for row in _checked(shots, rows_of(shots), None) if shots else ():
        if len(examples[row["subject"]]) < num_shots:
            examples[row["subject"]].append(f"{_text(row)} {LETTERS[row['answer']]}\n\n")
    made = []
    for row in _checked(path, rows_of(path), requests):
        header = HEADER.format(subject=row["subject"].replace("_", " "))
        made.append((header + "".join(examples[row["subject"]]) + _text(row), row))
    return made


class Harness:
    """A model type of lm-eval, over a model that is loaded."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model

    def forget(self) -> None:
        """Nothing may be left of earlier runs."""
        if hasattr(self.model, "paged_engine"):
            self.model.paged_engine().forget()
            self.model.paged_engine().reset_stats()

    def run(self, requests: list[Any]) -> dict[str, Any]:
        """One pass: seconds of wall and processor time, and a (log-likelihood, greedy) pair a request."""
        self.forget()
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        found = self.model.loglikelihood(requests, disable_tqdm=True)
        return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "found": found}


def harnesses(loaded: Loaded, settings: dict[str, Any]) -> tuple[Harness, Harness]:
    """lm-eval's `hf` and `hf-paged` over one model.

    Raises:
        BadInput: lm-eval is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM

        from hf_paged.integrations.lm_eval import PagedLM
    except ImportError as error:
        raise BadInput(f"lm-eval is needed ({error}): pip install 'hf-paged[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that are loaded already
    given = {"tokenizer": loaded.tokenizer}
    return Harness("hf-paged", PagedLM(loaded.model, **given, **settings)), Harness("hf", HFLM(loaded.model, **given))


def as_requests(questions: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    """lm-eval's requests: each question with each of its letters."""
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", row, (context, f" {LETTERS[i]}"), i)
        for context, row in questions
        for i in range(len(row["choices"]))
    ]


def accuracy(questions: Sequence[tuple[str, dict[str, Any]]], found: Sequence[tuple[float, bool]]) -> float:
    """Share of the questions whose answer is the likeliest letter."""
    scores, right = iter(found), 0
    for _, row in questions:
        own = [next(scores)[0] for _ in row["choices"]]
        right += own.index(max(own)) == row["answer"]
    return right / len(questions)


def best_size(harness: Harness, requests: list[Any], sizes: Sequence[int], progress: Progress) -> dict[int, float]:
    """Seconds by batch size; the harness keeps the fastest."""
    seconds = {}
    for size in sizes:
        progress.note(f"{harness.name}: batches of {size}")
        harness.model.batch_size_per_gpu = size
        seconds[size] = harness.run(requests)["seconds"]
        progress.done()
    harness.model.batch_size_per_gpu = min(seconds, key=seconds.__getitem__)
    return seconds


def run_score(
    loaded: Loaded,
    questions: Sequence[tuple[str, dict[str, Any]]],
    *,
    sizes: Sequence[int],
    sample: int,
    repeats: int,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time both in turns; `hf` with the batch size that is fastest on `sample` questions.

    Returns:
        A report: `rows` (one a model type), `ratio`, and the largest difference of log-likelihoods.
    """
    progress = progress or Progress()
    progress.plan(len(sizes) + 1 + 2 * repeats)
    ours, theirs = harnesses(loaded, settings or {})
    requests = as_requests(questions)
    few = as_requests(questions[:: max(len(questions) // sample, 1)][:sample])
    by_size = best_size(theirs, few, sizes, progress)
    ours.run(few)
    progress.done()
    runs: dict[str, list[dict[str, Any]]] = {ours.name: [], theirs.name: []}
    for turn in range(repeats):
        for harness in (ours, theirs):
            progress.note(f"{harness.name}: run {turn + 1} of {repeats}")
            runs[harness.name].append(harness.run(requests))
            progress.done()
    stats = ours.model.paged_engine().stats()
    rows = [_row(name, done, questions) for name, done in runs.items()]
    pairs = list(zip(runs[ours.name][-1]["found"], runs[theirs.name][-1]["found"], strict=True))
    return {
        "benchmark": "score",
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "questions": len(questions),
        "requests": len(requests),
        "repeats": repeats,
        "rows": rows,
        "ratio": rows[1]["seconds"] / rows[0]["seconds"],
        "cpu_ratio": rows[1]["cpu_seconds"] / rows[0]["cpu_seconds"],
        "accuracy_equal": rows[0]["accuracy"] == rows[1]["accuracy"],
        "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy_differs": sum(a[1] != b[1] for a, b in pairs),
        "batch_size": theirs.model.batch_size_per_gpu,
        "seconds_of_batch_sizes": by_size,
        "computed_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "machine": machine(),
    }


def _row(name: str, runs: list[dict[str, Any]], questions: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "engine": name,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "cpu_seconds": statistics.median(run["cpu"] for run in runs),
        "seconds_of_runs": [run["seconds"] for run in runs],
        "accuracy": accuracy(questions, runs[-1]["found"]),
    }
