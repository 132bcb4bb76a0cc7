"""`generate_dataset`: a model's answers to all rows of a dataset, in a directory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.directory import OutputDirectory
from hf_paged.integrations.datasets.models import Served, serve
from hf_paged.integrations.datasets.processes import Processes
from hf_paged.integrations.datasets.recipe import GREEDY, Recipe
from hf_paged.integrations.datasets.report import make_reporter
from hf_paged.integrations.datasets.runner import Runner
from hf_paged.integrations.datasets.shard import Shard
from hf_paged.integrations.datasets.sight import Reporter, Sight
from hf_paged.integrations.datasets.source import Source, open_source
from hf_paged.integrations.datasets.summary import Account, Summary, summarise
from hf_paged.integrations.datasets.template import Template
from hf_paged.params import SamplingParams

LOOK_SECONDS = 0.5


class Interrupted(KeyboardInterrupt):
    """A run that Ctrl-C ended cleanly; `summary` tells how far it came. The same call goes on from there."""

    def __init__(self, summary: Summary) -> None:
        super().__init__(f"stopped: the same call again goes on where it was ({summary.out})")
        self.summary = summary


def generate_dataset(
    model: Any,
    dataset: Any,
    out: str | Path,
    *,
    template: str | Path | Template | Callable[[Mapping], Any] | None = None,
    messages: str | None = None,
    chat: bool = False,
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    too_long: str = "fail",
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    format: str = "jsonl",
    shard_rows: int = 1000,
    window: int | None = None,
    shard: Shard | tuple[int, int] | None = None,
    progress: bool | Reporter = False,
    workers: int | None = None,
    tokenizer: Any = None,
    draft_model: Any = None,
    speculation: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    **settings: Any,
) -> Summary:
    """Generate for every row of a dataset, and write the rows to a directory.

    Rows are read as they are needed and written as they end, each with `row` (its number), `prompt`, `text`,
    `token_ids`, `finish_reason`, `prompt_tokens`, `truncated` (tokens cut off the prompt) and `error` (None where all
    is well). A row's tokens depend on model, prompt, `sampling`, `seed` and its number only. Killed at any moment, the
    same call goes on with the rows that are missing; a call that would generate anything else is refused.

    Args:
        model: a model, an `Engine` with a tokenizer, or a folder or hub name.
        dataset: see `open_source`; also `split`, `subset`, `limit` (which may change when a run is resumed).
        out: a directory: new, empty, or of the run that is to be resumed.
        template: a text over columns, Jinja (`{{ question }}`) or plain (`{question}`); a file with one; or a function
            of a row that gives a text, messages or token ids. Default: column `prompt`.
        messages: a column with a list of messages for the tokenizer's chat template, instead.
        chat: put the rendered text into the chat template, as a user's turn.
        sampling: `SamplingParams` or some of its fields. Greedy where no temperature is given.
        max_tokens: most tokens a row; 256 unless `sampling` says something else.
        seed: of the run; row `i` is drawn with a seed of its own that derives from it.
        too_long: `fail` the row, or `truncate-left`.
        format: `jsonl`, or `parquet` in shards of `shard_rows` rows.
        window: rows queued in the engine at once.
        shard: `(rank, world)`: this process's rows, where several run the same call (see `Shard`). Default: as
            `accelerate launch` says; the first process then returns the summary of all.
        progress: show it on stderr; or something to tell it to.
        workers: engines in actors of Ray, with `backend="ray"`. Default: one a GPU, or one.
        tokenizer: of a `model` that is a module. draft_model, speculation: as for `Engine`, or a draft by its name.
        dtype, device: for a `model` that is a name. The dtype is by default as saved, but float32 on a CPU, where
            others are slow.
        settings: of `EngineConfig`; `backend="ray"` runs the job on Ray Data, each worker with an engine.

    Raises:
        BadInput: (a ValueError) an argument cannot be used, the directory is in use, or belongs to another run.
        OSError: the disk is full; rows written so far are kept.
        ProcessDied: another process of the job is gone; rows written so far are kept.
        Interrupted: on Ctrl-C, when all is written and the engine closed.
    """
    recipe = Recipe(as_template(template, messages), chat, as_sampling(sampling, max_tokens), seed, too_long)
    source = open_source(dataset, split=split, subset=subset, limit=limit)
    recipe.template.check(source.sample)
    reporter = make_reporter() if progress is True else progress or None
    if settings.get("backend") == "ray":
        given = (model, tokenizer, draft_model, speculation, dtype, device, settings | {"backend": "auto"})
        directory = OutputDirectory(out, format, shard_rows)
        return _on_ray(given, recipe, source, directory, reporter, workers, window)
    if workers is not None:
        raise BadInput(f"workers={workers}: for backend='ray' only; accelerate launch starts its own processes")
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(shard))
        directory = OutputDirectory(out, format, shard_rows, processes.shard)
        device = device or processes.device
        served = serve(model, tokenizer, draft_model, speculation, dtype, device, recipe, source, settings)
        stack.callback(served.close)
        stack.enter_context(directory)
        runner = Runner(served.engine, recipe, window)
        processes.begin(directory, lambda: directory.prepare(manifest_of(served, recipe, source, format)))
        reporter = processes.reporter(reporter, source.total)
        summary = Run(runner, source, directory, reporter).go()
        directory.close()
        summary = processes.finish(directory, summary)
        if not summary.finished:
            raise Interrupted(summary)
        return summary


def _on_ray(
    given: tuple[Any, ...],
    recipe: Recipe,
    source: Source,
    directory: OutputDirectory,
    reporter: Reporter | None,
    workers: int | None,
    window: int | None,
) -> Summary:
    """The same with engines in actors of Ray; this process alone writes."""
    from hf_paged.integrations.datasets.ray_backend import OnRay, RemoteRunner, check_ray

    check_ray(given[0], workers)
    with OnRay(given, recipe, source, workers, window) as ray, directory:
        directory.prepare(ray.manifest(manifest_of, directory.form))
        directory.open()
        summary = Run(RemoteRunner(ray, directory), source, directory, reporter).go()
        directory.close()
        directory.write_summary(summary.to_dict())
        if not summary.finished:
            raise Interrupted(summary)
        return summary


def as_template(given: Any, messages: str | None) -> Template:
    """A template in any of the forms that `generate_dataset` takes."""
    if isinstance(given, Template):
        if messages is not None:
            raise BadInput("give a template or a column of messages, not both")
        return given
    if isinstance(given, (str, Path)) and messages is None:
        return Template.load(str(given))
    return Template(given, messages=messages)


def as_sampling(given: Any, max_tokens: int | None) -> SamplingParams:
    """Sampling parameters in any of the forms that `generate_dataset` takes.

    Raises:
        BadInput: a value, or a name, that `SamplingParams` does not take.
    """
    try:
        params = given if isinstance(given, SamplingParams) else replace(GREEDY, **(given or {}))
        return params if max_tokens is None else replace(params, max_tokens=max_tokens)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from error


def manifest_of(served: Served, recipe: Recipe, source: Source, form: str) -> dict[str, Any]:
    """What a run that is to be resumed must share, and what people want to know of it."""
    from hf_paged import __version__

    limit, _ = served.engine.core.capacity.limit
    model = {"weights": served.identity, "dtype": str(served.engine.facts.dtype).removeprefix("torch.")}
    run = {"model": model, "dataset": source.fingerprint} | recipe.describe() | {"format": form, "row_limit": limit}
    return {"run": run, "about": {"model": served.name, "dataset": source.name, "hf_paged": __version__}}


@dataclass
class Run:
    """Rows from a source through a runner into a directory, until there are no more, or Ctrl-C."""

    runner: Runner
    source: Source
    directory: OutputDirectory
    reporter: Reporter | None = None

    def go(self) -> Summary:
        """Returns: what was done; `finished` is False after Ctrl-C."""
        self.runner.engine.reset_stats()
        total, before, self.failed_before = self._expected()
        self.account, self.sight = Account(), Sight(self.runner.engine, total, before)
        self._tell("begin")
        try:
            with closing(self.runner.batches(self.source.rows(self._wanted))) as batches, _interrupts() as stop:
                finished = self._work(batches, stop)
        finally:
            self._tell("end")
        summary = summarise(
            str(self.directory.path), self.account, self.runner.engine, self.sight, self.runner.engine_seconds
        )
        summary.finished, summary.failed_before = finished, self.failed_before
        return summary

    def _work(self, batches: Iterator[list[dict]], stop: threading.Event) -> bool:
        due = LOOK_SECONDS
        for batch in batches:
            if batch:
                self.directory.write(batch)
                self.account.add(batch)
            if stop.is_set():
                return False
            if self.sight.seconds >= due:
                self._tell("update")
                due = self.sight.seconds + LOOK_SECONDS
        return True

    def _wanted(self, row: int) -> bool:
        return self.directory.shard.mine(row) and row not in self.directory.done

    def _expected(self) -> tuple[int | None, int, int]:
        """This process's rows: in all, where that is known, those that are written, and of them those that failed."""
        shard, total, done = self.directory.shard, self.source.total, self.directory.done
        mine = range(shard.rank, done.end if total is None else total, shard.world)
        return None if total is None else len(mine), sum(row in done for row in mine), sum(map(done.failed, mine))

    def _tell(self, what: str) -> None:
        failed = self.failed_before + self.account.failed
        glance = self.sight.look(self.sight.before + self.account.rows, failed, self.runner.in_flight)
        if self.reporter is not None:
            with suppress(OSError):  # a terminal that went away ends no run
                getattr(self.reporter, what)(glance)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step ends first; a second one is a KeyboardInterrupt at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    if before is None or before is signal.SIG_IGN:  # not Python's, or not wanted
        yield stop
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
