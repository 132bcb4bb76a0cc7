"""Where a run is, on a terminal as a bar, elsewhere as plain lines; both on stderr."""

from __future__ import annotations

import sys
from datetime import timedelta

from hf_paged.integrations.datasets.sight import Glance, Reporter

LINE_SECONDS = 10.0


def make_reporter() -> Reporter:
    """What suits stderr."""
    return Bar() if sys.stderr.isatty() else Lines()


def told(glance: Glance) -> str:
    """A glance as words."""
    parts = [f"{glance.rows_per_second:.1f} rows/s", f"{glance.tokens_per_second:.0f} tokens/s"]
    parts.append(f"prefix hits {100 * glance.hit_rate:.0f} %")
    if glance.acceptance is not None:
        parts.append(f"drafts taken {100 * glance.acceptance:.0f} %")
    parts += [f"batch {glance.batch:.0f}", f"KV {100 * glance.kv_use:.0f} %", f"failed {glance.failed}"]
    return ", ".join(parts)


def left(glance: Glance) -> str:
    """The time left as h:mm:ss."""
    return "?" if glance.seconds_left is None else str(timedelta(seconds=round(glance.seconds_left)))


class Lines:
    """A line at the beginning, every so often, and at the end."""

    def __init__(self, every: float = LINE_SECONDS) -> None:
        self.every, self._next = every, every

    def begin(self, glance: Glance) -> None:
        total = "an unknown number of" if glance.total is None else glance.total
        before = f", {glance.written} are written already" if glance.written else ""
        self._print(f"{total} rows{before}")

    def update(self, glance: Glance) -> None:
        if glance.seconds >= self._next:
            self._next = glance.seconds + self.every
            self._line(glance)

    def end(self, glance: Glance) -> None:
        self._line(glance)

    def _line(self, glance: Glance) -> None:
        of = "" if glance.total is None else f"/{glance.total}"
        self._print(f"{glance.written}{of} rows, {told(glance)}, left {left(glance)}")

    def _print(self, text: str) -> None:
        print(f"hf-paged: {text}", file=sys.stderr, flush=True)


class Bar:
    """A bar of rows with the figures beside it."""

    def begin(self, glance: Glance) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = [BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}")]
        self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._bar.start()
        self._task = self._bar.add_task("", total=glance.total)
        self.update(glance)

    def update(self, glance: Glance) -> None:
        text = f"left {left(glance)}, {told(glance)}"
        self._bar.update(self._task, completed=glance.written, description=text, refresh=True)

    def end(self, glance: Glance) -> None:
        self.update(glance)
        self._bar.stop()
