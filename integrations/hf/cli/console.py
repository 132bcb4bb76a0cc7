"""What all commands share: how they end, how they talk, and how they show where they are."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

MISTAKE, FAILURE = 2, 1


def complain(message: str) -> None:
    """One line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"hf-paged: {message}", markup=False)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make exit codes of what a command raises: 2 for the user's mistake, 1 for a failure, and no traceback.

    A failure's traceback is shown when HF_PAGED_TRACEBACK is set.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        from hf_paged.integrations.bench.data import BadInput

        try:
            function(*args, **kwargs)
        except BadInput as error:
            complain(str(error))
            raise typer.Exit(MISTAKE) from error
        except (typer.Exit, typer.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("HF_PAGED_TRACEBACK"):
                traceback.print_exc()
            complain(f"failed: {type(error).__name__}: {error}")
            if not os.environ.get("HF_PAGED_TRACEBACK"):
                complain("set HF_PAGED_TRACEBACK=1 to see where")
            raise typer.Exit(FAILURE) from error

    return wrapper


@contextmanager
def users_values() -> Iterator[None]:
    """A ValueError in here comes from a value that the user gave."""
    from hf_paged.integrations.bench.data import BadInput

    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def print_json(value: Any, path: str = "-") -> None:
    """Write JSON to a file, or to stdout for `-`.

    Raises:
        BadInput: if the file cannot be written.
    """
    from hf_paged.integrations.bench.data import BadInput

    text = json.dumps(value, indent=2, ensure_ascii=False)
    if path == "-":
        typer.echo(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as out:
            out.write(text + "\n")
    except OSError as error:
        raise BadInput(f"--json {path}: cannot be written: {error}") from error


def check_outputs(json_out: str | None, plot: str | None) -> None:
    """Refuse what could not be written after hours of work: a report, a picture."""
    from hf_paged.integrations.bench.data import BadInput

    check_writable(json_out)
    if plot is None:
        return
    check_writable(plot, "--plot")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput(f"--plot needs matplotlib ({error}): pip install 'hf-paged[plot]'") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if os.path.splitext(plot)[1][1:].lower() not in ("", *kinds):
        raise BadInput(
            f"--plot {plot}: no kind of picture that is written here; give one of {', '.join(sorted(kinds))}"
        )


def check_writable(path: str | None, option: str = "--json") -> None:
    """Refuse a path before the long work rather than after it."""
    from hf_paged.integrations.bench.data import BadInput

    if path is None or path == "-":
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise BadInput(f"{option} {path}: cannot be written there")


ENGINE_SETTINGS = (
    "page_size",
    "num_pages",
    "memory_fraction",
    "max_model_len",
    "max_batch_tokens",
    "max_sequences",
    "kv_dtype",
    "backend",
)


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """Engine settings among a command's options that were given, checked.

    Raises:
        BadInput: on a value that the engine refuses.
    """
    from hf_paged.config import EngineConfig

    given = {name: values[name] for name in ENGINE_SETTINGS if values.get(name) is not None}
    with users_values():
        EngineConfig.from_dict(given)
    return given


def quiet_transformers() -> None:
    """Keep transformers' progress bars and warnings off the screen: the command line has its own."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()


def warn_if_busy() -> None:
    """Say so when something else keeps the machine busy.

    Threads that must share a core wait for each other all the time: figures can be off by a factor of ten, for some
    engines more than for others.
    """
    from hf_paged.integrations.bench.machine import cores, load_average

    load = load_average()
    if load is not None and load > max(1.0, 0.6 * cores()):
        complain(f"the machine is busy (load {load:.1f} on {cores()} cores): timings will be off")


class Bar:
    """A progress bar on stderr, only on a terminal; the same calls as the benchmarks' `Progress`."""

    def __enter__(self) -> Bar:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        # A slow refresh: the bar must not take time from what is measured.
        self._bar = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            refresh_per_second=2,
        )
        self._bar.start()
        self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def plan(self, steps: int) -> None:
        self._bar.update(self._task, total=steps)

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def done(self) -> None:
        self._bar.advance(self._task)
