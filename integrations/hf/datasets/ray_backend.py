"""The same job on Ray Data: actors with an engine each answer batches of rows, the caller alone writes them.

Rows enter Ray as pickled bytes with their numbers, and come back as they are to be written. Where an actor dies, Ray
starts another and gives it the batch again; rows that came back before are known to the directory and left out.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.directory import OutputDirectory
from hf_paged.integrations.datasets.models import serve
from hf_paged.integrations.datasets.recipe import Recipe
from hf_paged.integrations.datasets.runner import Runner
from hf_paged.integrations.datasets.source import Source
from hf_paged.stats import EngineStats

BATCH = 256  # rows that an actor gets at once
BLOCK, BLOCK_BYTES = 16, 1 << 14  # rows that enter together; bytes that Ray puts together
STORE_BYTES = 1 << 28  # for rows on their way, where Ray is started here
ADDED = [f.name for f in fields(EngineStats) if f.name not in ("optimal_tokens", "kv_waste", "page_bytes")]


def check_ray(model: Any, workers: int | None) -> None:
    """Whether a job can run on Ray.

    Raises:
        BadInput: it cannot; the message says why.
    """
    if find_spec("ray") is None:
        raise BadInput("backend='ray' needs Ray: pip install 'hf-paged[ray]'")
    if model is not None and not isinstance(model, str | os.PathLike):
        raise BadInput(f"model={type(model).__name__}: on Ray every worker loads the model, so give a folder or a name")
    if workers is not None and workers < 1:
        raise BadInput(f"workers={workers}: must be at least 1")


class Worker:
    """An engine in an actor. A call takes a batch of rows, and yields those that have ended, step by step.

    Args:
        make: gives the engine (as `Served`).
        recipe, window: as for `Runner`.
    """

    def __init__(self, make: Callable[[], Any], recipe: Recipe, window: int | None) -> None:
        self.runner = Runner(make().engine, recipe, window)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rows = zip(batch["row"].tolist(), map(pickle.loads, batch["data"]), strict=True)
        for ended in self.runner.batches(rows):
            if ended:
                yield _block([(row["row"], row) for row in ended])
        said = os.getpid(), self.runner.engine.stats(), self.runner.engine.speculation_stats()
        yield _block([(-1, (*said, self.runner.engine_seconds))])


def _block(items: list[tuple[int, Any]]) -> dict[str, list]:
    return {"row": [number for number, _ in items], "data": [pickle.dumps(item) for _, item in items]}


class RemoteRunner:
    """What `Run` needs of a runner, for engines in actors.

    Args:
        job: the actors.
        directory: where their rows go; those that are there are not asked for.

    Attributes:
        engine: tells what all of them did; here it is this object.
    """

    speculator = None

    def __init__(self, job: OnRay, directory: OutputDirectory) -> None:
        self._job, self._directory = job, directory
        self.engine, self.in_flight = self, 0
        self._said: dict[int, tuple[EngineStats, Any, float]] = {}

    def batches(self, rows: Iterable[tuple[int, Any]]) -> Iterator[list[dict]]:
        """Rows as they come back; what an actor that died had sent already comes only once.

        `rows` are not looked at here: a process of Ray's reads them.
        """
        done = self._directory.done
        for block in self._job.ask(lambda number: number not in done):
            ended, seen = [], set()
            for number, data in zip(block["row"].tolist(), block["data"], strict=True):
                item = pickle.loads(data)
                if number < 0:
                    self._said[item[0]] = item[1:]
                    self.speculator = self.speculator or (item[2].proposers or None)
                elif number not in done and number not in seen:
                    seen.add(number)
                    ended.append(item)
            yield ended

    @property
    def engine_seconds(self) -> float:
        """Time in steps, the mean of all actors."""
        return sum(said[2] for said in self._said.values()) / max(1, len(self._said))

    def reset_stats(self) -> None:
        """Nothing has been counted here."""

    def stats(self) -> EngineStats:
        """What all actors did, as far as they have told: after each batch."""
        if not self._said:
            return EngineStats(pages_free=1, pages_total=1)
        total = EngineStats()
        for stats, _, _ in self._said.values():
            added = {name: getattr(total, name) + getattr(stats, name) for name in ADDED}
            total = replace(total, page_bytes=stats.page_bytes, **added)
        return total

    def speculation_stats(self) -> Any:
        """Drafts of all actors, as far as `summarise` asks."""
        return _Drafts([said[1] for said in self._said.values()])


class _Drafts:
    def __init__(self, all_stats: list[Any]) -> None:
        self.proposed = sum(stats.proposed for stats in all_stats)
        self.accepted = sum(stats.accepted for stats in all_stats)


class OnRay:
    """Engines of a job, on the Ray that is there, or a local one.

    Args:
        arguments: of `serve`, but for the recipe and the source.
        workers: actors. Default: one a GPU, or one where there are none.
    """

    def __init__(self, arguments: tuple, recipe: Recipe, source: Source, workers: int | None, window: int | None):
        import ray

        self._stack = ExitStack()
        if not ray.is_initialized():
            ray.init(object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
            self._stack.callback(ray.shutdown)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if arguments[-2] in (None, "cuda") else 0
        self.workers, self.gpus = workers or max(gpus, 1), int(gpus > 0)
        *given, settings = arguments

        def make() -> Any:
            return serve(*given, recipe, source, settings)

        self._make, self.recipe, self.source, self.window = make, recipe, source, window

    def __enter__(self) -> OnRay:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def manifest(self, manifest_of: Callable[..., dict], form: str) -> dict[str, Any]:
        """What the job's manifest is, as a worker sees the model.

        Raises:
            BadInput: as `serve`.
        """
        import ray

        make, recipe, source = self._make, self.recipe, self.source

        def look() -> dict[str, Any] | str:
            try:
                return manifest_of(make(), recipe, source, form)
            except BadInput as error:
                return str(error)

        seen = ray.get(ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=3)(look).remote())
        if isinstance(seen, str):
            raise BadInput(seen)
        return seen

    def ask(self, wanted: Callable[[int], bool]) -> Iterator[dict]:
        """Blocks of rows that actors have answered, of those that are wanted; they are read as fast as they do."""
        import ray.data

        context, source = ray.data.DataContext.get_current(), self.source
        before = context.enable_progress_bars, context.target_max_block_size
        context.enable_progress_bars, context.target_max_block_size = False, BLOCK_BYTES
        try:
            rows = _datasource(lambda: source.rows(wanted))
            read = ray.data.read_datasource(rows, num_cpus=0, override_num_blocks=1)
            asked = read.map_batches(
                Worker,
                fn_constructor_args=(self._make, self.recipe, self.window),
                batch_size=self._batch(),
                compute=ray.data.ActorPoolStrategy(size=self.workers),
                num_cpus=1,
                num_gpus=self.gpus,
            )
            yield from asked.iter_batches(batch_size=None, batch_format="numpy")
        finally:
            context.enable_progress_bars, context.target_max_block_size = before

    def _batch(self) -> int:
        """Rows that an actor gets at once: of a small dataset so few that all actors have some."""
        most = self.window or BATCH
        return most if self.source.total is None else max(1, min(most, self.source.total // (2 * self.workers)))


def _datasource(rows: Callable[[], Iterator[tuple[int, Any]]]) -> Any:
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def blocks() -> Iterator[Any]:
        import pyarrow as pa

        held: list[tuple[int, Any]] = []
        for item in rows():
            held.append(item)
            if len(held) == BLOCK:
                yield pa.table(_block(held))
                held = []
        if held:
            yield pa.table(_block(held))

    class Rows(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            return [ReadTask(blocks, BlockMetadata(None, None, None, None))]

    return Rows()
