"""Tiles that were measured on a card, in place of those that `launch.py` works out: a file, read once a card.

`hf-paged tune` writes it. Tiles depend on shape and card alone, measured or not: no row's result depends on its batch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hf_paged.kernels.launch import (
    HeadShape,
    Target,
    TileConfig,
    decode_config,
    extend_config,
    power_of_two,
    tile_bytes,
)

KINDS = ("decode", "few", "many")  # kernels: one query a row, few queries a row, many
FORMAT = 1
NUMBERS = ("block_m", "block_n", "split", "warps", "stages")  # of a `TileConfig`, what is measured
VARIABLE = "HF_PAGED_TILES"


def tiles_of(kind: str, shape: HeadShape, target: Target) -> TileConfig:
    """How a kernel of `KINDS` is launched: as measured on the card, or else as worked out."""
    return table_of(target).get(key_of(kind, shape)) or worked_out(kind, shape, target)


def worked_out(kind: str, shape: HeadShape, target: Target) -> TileConfig:
    """What `launch.py` says."""
    return decode_config(shape, target) if kind == "decode" else extend_config(shape, target, kind == "few")


def key_of(kind: str, shape: HeadShape) -> str:
    """Names tiles in a file. The page size changes an index only."""
    numbers = (shape.group, shape.kv_heads, shape.key_dim, shape.value_dim, shape.itemsize)
    return ":".join([kind, *map(str, numbers)])


def table_path(target: Target) -> Path | None:
    """Where tiles of a card are kept: what `HF_PAGED_TILES` names (empty: nowhere), or a file in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_home) / "hf_paged" / f"tiles-{target.arch}-{target.processors}.json"


@cache
def table_of(target: Target) -> dict[str, TileConfig]:
    """Tiles measured on a card, by `key_of`; none where there is no file, or, with a warning, where it is no good."""
    path = table_path(target)
    if path is None or not path.is_file():
        return {}
    try:
        return read_table(path, target)
    except (OSError, ValueError) as error:
        warnings.warn(f"hf_paged: {path} is not used: {error}", RuntimeWarning, stacklevel=2)
        return {}


def read_table(path: Path, target: Target) -> dict[str, TileConfig]:
    """Tiles in a file, by `key_of`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, of another format or card, or holds what the kernels do not take.
    """
    try:
        stored = json.loads(path.read_text())
        card, tiles = Target(**stored["card"]), dict(stored["tiles"])
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']} is not {FORMAT}")
        if card != target:
            raise ValueError(f"it was measured on {card.arch} with {card.processors} processors")
        return {key: _checked(key, numbers, target) for key, numbers in tiles.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None


def _checked(key: str, numbers: dict[str, int], target: Target) -> TileConfig:
    kind, *shape = key.split(":")
    if kind not in KINDS or len(shape) != 5:
        raise ValueError(f"{key!r} names no kernel and shape")
    shape = HeadShape(*map(int, shape), page_size=16)
    config = replace(worked_out(kind, shape, target), **{name: int(numbers[name]) for name in NUMBERS})
    if not fits(config, shape, target):
        raise ValueError(f"{key}: {numbers} does not suit the shape or the card")
    return config


def fits(config: TileConfig, shape: HeadShape, target: Target) -> bool:
    """Whether the kernels take such tiles for a shape, and the card has room for them."""
    sizes = (config.block_m, config.block_n, config.split, config.warps)
    if any(size < 1 or size != power_of_two(size) for size in sizes) or not 1 <= config.stages <= 8:
        return False
    if config.block_m < max(16, shape.group) or config.block_n < 16 or config.split < config.block_n:
        return False
    return config.warps <= 16 and tile_bytes(shape, config.block_m, config.block_n, config.stages) <= target.shared


def write_table(path: Path, target: Target, tiles: dict[str, TileConfig]) -> None:
    """Add tiles to a file; what is there of the same card and format stays.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    try:
        known = read_table(path, target)
    except (OSError, ValueError):
        known = {}
    stored = {key: {name: asdict(config)[name] for name in NUMBERS} for key, config in sorted((known | tiles).items())}
    content: dict[str, Any] = {"format": FORMAT, "card": asdict(target), "tiles": stored}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def candidates(kind: str, shape: HeadShape, target: Target) -> Iterator[TileConfig]:
    """Tiles worth a try: all that fit, with the splits that are worked out."""
    known = worked_out(kind, shape, target)
    heights = {known.block_m} if kind != "many" else {max(size, power_of_two(shape.group)) for size in (64, 128)}
    for block_m in sorted(heights):
        for block_n in (16, 32, 64, 128):
            for stages in (2, 3, 4):
                for warps in (4, 8):
                    split = max(known.split, block_n)
                    config = replace(known, block_m=block_m, block_n=block_n, stages=stages, warps=warps, split=split)
                    if config != known and fits(config, shape, target):
                        yield config


def other_splits(config: TileConfig) -> Iterator[TileConfig]:
    """The same tiles with rows split otherwise."""
    for split in (128, 256, 512, 1024, 2048, 4096):
        if split != config.split and split >= config.block_n:
            yield replace(config, split=split)
