"""Several processes that `accelerate launch` starts with one job: they begin together, and end in one summary.

At the beginning they talk through torch.distributed. At the end, which may be hours apart, through files: each leaves
its summary, and a process whose lock is free without one has died.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from hf_paged.integrations.bench.data import BadInput
from hf_paged.integrations.datasets.chorus import Beacon, Chorus, beacon_file
from hf_paged.integrations.datasets.directory import OutputDirectory
from hf_paged.integrations.datasets.manifest import write_json
from hf_paged.integrations.datasets.shard import Shard
from hf_paged.integrations.datasets.sight import Reporter
from hf_paged.integrations.datasets.summary import Summary
from hf_paged.integrations.datasets.totals import joined, summary_of

POLL_SECONDS, GRACE_SECONDS = 0.2, 5.0


class ProcessDied(RuntimeError):
    """Another process of the job has ended before its rows were done."""


class Processes:
    """This process among those of a job; alone where `shard` says so, or nothing was launched.

    Args:
        shard: as `generate_dataset` takes it; None: what `accelerate launch` has started.

    Attributes:
        shard: this process's rows.
        device: this process's, or None: it may have any.
    """

    def __init__(self, shard: Shard | tuple[int, int] | None = None) -> None:
        self._state, self._chorus = None, None
        if shard is None and launched():
            self._join()
        else:
            self.shard = Shard() if shard is None else Shard.of(shard)
        many = self._state is not None and self.shard.world > 1
        self.device = str(self._state.device) if many else None
        self._state = self._state if many else None

    def _join(self) -> None:
        import torch
        from accelerate import PartialState

        theirs = bool(PartialState._shared_state)  # the caller has made it
        self._state = PartialState() if theirs else PartialState(cpu=not torch.cuda.is_available())
        if not theirs:
            atexit.register(self._state.destroy_process_group)
        self.shard = Shard(self._state.process_index, self._state.num_processes)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType) -> None:
        if self._chorus is not None:
            self._chorus.close()

    # -- the beginning

    def begin(self, directory: OutputDirectory, prepare: Callable[[], Any]) -> None:
        """Let the first process prepare the directory, then all open it.

        Raises:
            BadInput: one of them could not; all are told.
            ProcessDied: one of them is gone.
        """
        first = self.shard.rank == 0

        def prepared() -> None:
            prepare()
            _tidy(directory.path)

        if self._state is None:
            if first:
                prepare()
            self.shard.barrier()
            directory.open()
            return
        self._together(prepared if first else None)
        self._together(directory.open)
        self._directory, self._before = directory, directory.done.count

    def _together(self, action: Callable[[], Any] | None) -> None:
        """Do `action` here; go on when no process has failed."""
        from accelerate.utils import gather_object

        failed = None
        try:
            if action is not None:
                action()
        except (BadInput, OSError) as error:
            failed = error
        try:
            said = gather_object([None if failed is None else str(failed)])
        except RuntimeError as error:
            raise ProcessDied("another process of this job ended before the job began") from error
        if failed is not None:
            raise failed
        for rank, text in enumerate(said):
            if text is not None:
                raise BadInput(f"process {rank} of {self.shard.world}: {text}")

    def reporter(self, reporter: Reporter | None, total: int | None) -> Reporter | None:
        """Tells all of the job to the first process's reporter, and of the others nothing."""
        if self._state is None or reporter is None:
            return reporter
        folder, rank = self._directory.path, self.shard.rank
        if rank:
            return Beacon(beacon_file(folder, rank))
        done = self._directory.done
        self._chorus = Chorus(reporter, folder, self.shard.world, total, (self._before, done.failed))
        return self._chorus

    # -- the end

    def finish(self, directory: OutputDirectory, summary: Summary) -> Summary:
        """Leave this process's summary; in the first process, wait for those of the others.

        Returns:
            in the first process, one of all.
        Raises:
            ProcessDied: a process has ended without one.
        """
        directory.write_summary(summary.to_dict())
        if self._state is None or self.shard.rank:
            return summary
        others = [self._summary_of(directory.path, rank) for rank in range(1, self.shard.world)]
        total = joined([summary, *others])
        total.rows_before = self._before
        write_json(directory.path / "summary.json", total.to_dict())
        if self._chorus is not None:
            self._chorus.close()
        _tidy(directory.path, "summary-*.json")
        return total

    def _summary_of(self, folder: Path, rank: int) -> Summary:
        path, free_since = folder / f"summary-{rank:05d}.json", None
        while not path.exists():
            now = time.monotonic()
            free_since = None if _held(folder / f".lock-{rank:05d}") else free_since or now
            if free_since is not None and now - free_since > GRACE_SECONDS:
                raise ProcessDied(
                    f"process {rank} of {self.shard.world} ended before its rows were done; what is written stays: "
                    "give the same command again"
                )
            if self._chorus is not None:
                self._chorus.look()
            time.sleep(POLL_SECONDS)
        return summary_of(json.loads(path.read_text(encoding="utf-8")))


def launched() -> bool:
    """Whether `accelerate launch` started this process.

    `RANK` and `WORLD_SIZE` alone do not count: processes of one tensor-parallel model have them, too, and all of those
    compute every row.
    """
    return any(name.startswith("ACCELERATE_") for name in os.environ)


def _tidy(folder: Path, summaries: str = "summary*.json") -> None:
    """Remove what processes leave for each other."""
    for pattern in (summaries, beacon_file(folder, None).name):
        for path in folder.glob(pattern):
            path.unlink()


def _held(path: Path) -> bool:
    """Whether a living process holds this lock."""
    try:
        FileLock(path).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False
