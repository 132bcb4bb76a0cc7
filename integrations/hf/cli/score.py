"""`hf-paged score`: log-likelihoods of the options of each row of a file, and which one is likeliest."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hf_paged.integrations.cli import options as opt
from hf_paged.integrations.cli.console import command, complain, quiet_transformers, settings_of

if TYPE_CHECKING:
    from hf_paged.integrations.engine import Engine
    from hf_paged.outputs import Score

WINDOW = 512  # rows that are scored together, and held in memory


@command
def score(
    dataset: Annotated[str, typer.Option(help="Rows: .jsonl, gzipped or not; one column holds lists of options.")],
    template: Annotated[
        str, typer.Option(help=r"Context of a row; names columns in braces.")
    ] = r"Question: {question}\nAnswer:",
    options: Annotated[str, typer.Option(help="Column of the options, a list of texts.")] = "choices",
    before: Annotated[str, typer.Option(help="Stands between the context and an option.")] = " ",
    answer: Annotated[str | None, typer.Option(help="Column of the right option: its index, letter or text.")] = None,
    by: Annotated[str, typer.Option(help="sum or mean: of tokens' log-likelihoods, for the choice.")] = "sum",
    truncate: Annotated[bool, typer.Option(help="Cut contexts that are too long at their beginning.")] = False,
    out: Annotated[str, typer.Option("--out", "-o", help="Where the rows go, as JSONL; - for stdout.")] = "-",
    model: opt.Model = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    threads: opt.Threads = None,
    page_size: opt.PageSize = None,
    num_pages: opt.NumPages = None,
    memory_fraction: opt.MemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_sequences: opt.MaxSequences = None,
    kv_dtype: opt.KvDtype = None,
    backend: opt.Backend = None,
) -> None:
    """Score the options of each row behind its context; tokens that rows share are computed once.

    A row of the output has `row`, `logprobs`, `tokens`, `greedy`, `choice`, with --answer `correct`, and `error`: a
    row that cannot be scored says why, and the others go on.
    """
    from hf_paged import Engine
    from hf_paged.integrations.bench.data import BadInput, rows_of
    from hf_paged.integrations.bench.models import load

    settings = settings_of(locals())
    if by not in ("sum", "mean"):
        raise BadInput(f"--by {by}: sum or mean")
    asking = _Asking(opt.unescaped(template), options, before, answer, by)
    first = next(iter(rows_of(dataset)), None)
    if first is None:
        raise BadInput(f"{dataset}: holds no rows")
    asking.read(first)  # a wrong name of a column shows before anything is computed
    quiet_transformers()
    opt.set_threads(threads)
    count = right = failed = 0
    with _opened(out) as lines:
        loaded = load(model, dtype, device)
        engine = Engine(loaded.model, tokenizer=loaded.tokenizer, **settings)
        for made in _scored(engine, asking, rows_of(dataset), truncate):
            lines.write(json.dumps({"row": count} | made, ensure_ascii=False) + "\n")
            count, right, failed = count + 1, right + made.get("correct", False), failed + (made["error"] is not None)
    found = engine.stats().cached_tokens
    share = f", {100 * right / count:.1f} % right" if answer else ""
    complain(f"{count} rows{share}, {failed} failed; {found} tokens were there already")


def _opened(path: str) -> AbstractContextManager[TextIO]:
    """The output, `-` being stdout.

    Raises:
        BadInput: it cannot be written.
    """
    from hf_paged.integrations.bench.data import BadInput

    try:
        return nullcontext(sys.stdout) if path == "-" else open(path, "w", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be written: {error}") from error


@dataclass(frozen=True)
class _Asking:
    """What is asked of a row; see the command's options."""

    template: str | None
    options: str
    before: str
    answer: str | None
    by: str

    def read(self, row: dict[str, Any]) -> tuple[str, list[str]]:
        """Context and options of a row.

        Raises:
            BadInput: it has no such columns.
        """
        from hf_paged.integrations.bench.data import BadInput

        try:
            context, options = (self.template or "").format(**row), row[self.options]
        except (KeyError, IndexError, ValueError) as error:
            raise BadInput(f"--template or --options does not fit a row with {', '.join(row)}: {error!r}") from error
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options) or not options:
            raise BadInput(f"column {self.options} holds {options!r}: a list of texts is needed")
        if self.answer is not None and self.right(row) is None:
            raise BadInput(f"column {self.answer} holds {row.get(self.answer)!r}: none of {options!r}")
        return context, [self.before + option for option in options]

    def right(self, row: dict[str, Any]) -> int | None:
        """Index of the right option, which the row gives as such, as a letter or as its text; None: it does not."""
        value, options = row.get(self.answer), row[self.options]
        if value in options:
            return options.index(value)
        if isinstance(value, str) and len(value) == 1:
            value = ord(value.upper()) - ord("A")
        return value if isinstance(value, int) and 0 <= value < len(options) else None

    def result(self, row: dict[str, Any], scores: list[Score]) -> dict[str, Any]:
        """The row of the output."""
        error = next((score.error for score in scores if score.error is not None), None)
        if error is not None:
            return {"error": str(error)}
        worth = [score.logprob / (len(score.logprobs) if self.by == "mean" else 1) for score in scores]
        made = {
            "logprobs": [score.logprob for score in scores],
            "tokens": [len(score.token_ids) for score in scores],
            "greedy": [score.is_greedy for score in scores],
            "choice": worth.index(max(worth)),
        }
        if self.answer is not None:
            made["correct"] = made["choice"] == self.right(row)
        return made | {"error": None}


def _scored(
    engine: Engine, asking: _Asking, rows: Iterator[dict[str, Any]], truncate: bool
) -> Iterator[dict[str, Any]]:
    """Rows of the output, in order; `WINDOW` rows are in memory at a time."""
    from hf_paged.integrations.bench.data import BadInput

    while window := list(islice(rows, WINDOW)):
        asked: list[tuple[str, list[str]] | BadInput] = []
        for row in window:
            try:
                asked.append(asking.read(row))
            except BadInput as error:
                asked.append(error)
        good = [each for each in asked if isinstance(each, tuple)]
        found = iter(engine.score([c for c, _ in good], [o for _, o in good], truncate=truncate))
        for row, each in zip(window, asked, strict=True):
            yield asking.result(row, next(found)) if isinstance(each, tuple) else {"error": str(each)}
