"""Progress of several processes as one: each leaves what it sees in a small file, the first adds them up."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_paged.integrations.datasets.sight import Glance, Reporter

BEACON_SECONDS = 1.0


def beacon_file(folder: Path, rank: int | None) -> Path:
    """Where a process leaves what it sees; a pattern for all without a rank."""
    return folder / f".progress-{'*' if rank is None else f'{rank:05d}'}.json"


class _Since:
    """Rows and failures since a run began: those before are not this process's alone."""

    first: Glance | None = None

    def since(self, glance: Glance) -> Glance:
        self.first = self.first or glance
        new = {"written": glance.written - self.first.written, "failed": glance.failed - self.first.failed}
        return replace(glance, **new)


class Beacon(_Since):
    """A reporter that leaves what it is told in a file, now and then."""

    def __init__(self, path: Path) -> None:
        self.path, self._next = path, 0.0

    def begin(self, glance: Glance) -> None:
        self._write(glance)

    def update(self, glance: Glance) -> None:
        if glance.seconds >= self._next:
            self._next = glance.seconds + BEACON_SECONDS
            self._write(glance)

    def end(self, glance: Glance) -> None:
        self._write(glance, ended=True)

    def _write(self, glance: Glance, ended: bool = False) -> None:
        unfinished = self.path.with_suffix(".tmp")
        with suppress(OSError):  # a disk that is full stops the rows, by name; not this
            unfinished.write_text(json.dumps({"ended": ended, "glance": asdict(self.since(glance))}))
            os.replace(unfinished, self.path)


class Chorus(_Since):
    """A reporter that adds what the beacons say to what it is told, for another one.

    Args:
        reporter: who is told.
        folder: of the beacons.
        world: processes.
        total: rows of all of them, or None.
        before: rows, and failures among them, that were written when the run began.
    """

    def __init__(
        self, reporter: Reporter, folder: Path, world: int, total: int | None, before: tuple[int, int]
    ) -> None:
        self.reporter, self.folder, self.world, self.total, self.before = reporter, folder, world, total, before
        self._last: Glance | None = None

    def begin(self, glance: Glance) -> None:
        self.reporter.begin(self._all(glance, now=False))

    def update(self, glance: Glance) -> None:
        self.reporter.update(self._all(glance))

    def end(self, glance: Glance) -> None:
        """The others may go on: `close` is the end."""
        self._last = glance

    def look(self) -> None:
        """Tell what the others do now that this process has no more to do."""
        if self._last is not None:
            self.reporter.update(self._all(_idle(self._last)))

    def close(self) -> None:
        """The end of all."""
        if self._last is not None:
            self.reporter.end(self._all(self._last, now=False))
            self._last = None

    def _all(self, glance: Glance, now: bool = True) -> Glance:
        """All together: as they are now, where those that have ended do nothing, or as each was last."""
        glances = [self.since(glance), *self._others(now)]

        def sum_of(name: str) -> Any:
            return sum(getattr(g, name) for g in glances)

        drafted = [g.acceptance for g in glances if g.acceptance is not None]
        written, rate = self.before[0] + sum_of("written"), sum_of("rows_per_second")
        return Glance(
            seconds=max(g.seconds for g in glances),
            written=written,
            failed=self.before[1] + sum_of("failed"),
            total=self.total,
            tokens_per_second=sum_of("tokens_per_second"),
            rows_per_second=rate,
            seconds_left=_left(self.total, written, rate),
            hit_rate=sum_of("hit_rate") / len(glances),
            acceptance=sum(drafted) / len(drafted) if drafted else None,
            kv_use=sum_of("kv_use") / len(glances),
            batch=sum_of("batch"),
            in_flight=sum_of("in_flight"),
        )

    def _others(self, now: bool) -> list[Glance]:
        found = []
        for rank in range(1, self.world):
            with suppress(OSError, ValueError, TypeError, KeyError):
                said = json.loads(beacon_file(self.folder, rank).read_text())
                glance = Glance(**said["glance"])
                found.append(_idle(glance) if now and said["ended"] else glance)
        return found


def _idle(glance: Glance) -> Glance:
    return replace(glance, tokens_per_second=0.0, rows_per_second=0.0, batch=0.0, in_flight=0)


def _left(total: int | None, written: int, rate: float) -> float | None:
    if total is None:
        return None
    return 0.0 if written >= total else (total - written) / rate if rate else None
