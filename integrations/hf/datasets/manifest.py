"""What a run was started with, in a file beside its rows; a run that differs is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_paged.integrations.bench.data import BadInput

NAME, VERSION = "manifest.json", 1
SHOWN = 60  # characters of a value in a message


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole at every moment.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    unfinished = path.with_suffix(".json.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def settle(folder: Path, manifest: dict[str, Any]) -> bool:
    """Write the manifest of a new run, or hold it against that of the run to be resumed.

    Args:
        manifest: `run`: all that decides the rows, as JSON knows it; `about`: what people want to know.

    Returns:
        whether there is a run to be resumed.
    Raises:
        BadInput: that run was another: each difference is named, with both values.
    """
    path = folder / NAME
    manifest = json.loads(json.dumps({"version": VERSION} | manifest))
    if not path.exists():
        write_json(path, manifest)
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        old = before["version"], before["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no manifest of a run: {error!r}") from error
    found = list(_differences(old, (VERSION, manifest["run"]), before.get("about", {}), manifest["about"]))
    if found:
        raise BadInput(
            f"{folder} holds a run with other settings; give the same, or another --out. Changed: {'; '.join(found)}"
        )
    return True


def _differences(old: tuple, new: tuple, about: dict, about_now: dict) -> Iterator[str]:
    if old[0] != new[0]:
        yield f"version: {old[0]} there, {new[0]} now"
        return
    before, now = dict(_flat(old[1])), dict(_flat(new[1]))
    for name in dict.fromkeys((*before, *now)):
        there, here = before.get(name), now.get(name)
        if there != here:
            label = name.split(".")[0]
            named = f" ({about[label]} there, {about_now[label]} now)" if label in about and label in about_now else ""
            yield f"{name}: {' there, '.join(_shown(there, here))} now{named}"


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, part in value.items():
        if isinstance(part, dict):
            yield from _flat(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def _shown(there: Any, here: Any) -> tuple[str, str]:
    """Both values, long texts from a little before where they part."""
    first = 0
    if isinstance(there, str) and isinstance(here, str) and max(len(there), len(here)) > SHOWN:
        first = max(0, len(os.path.commonprefix([there, here])) - SHOWN // 3)
    return _cut(there, first), _cut(here, first)


def _cut(value: Any, first: int) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    part = value[first : first + SHOWN]
    return f"{'…' if first else ''}{json.dumps(part, ensure_ascii=False)}{'…' if first + SHOWN < len(value) else ''}"
