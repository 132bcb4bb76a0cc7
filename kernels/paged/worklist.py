"""What the kernels must know of a step, as tensors on the device: made once a step, copied at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_paged.kernels.card import target_of
from hf_paged.kernels.launch import HeadShape, TileConfig, full_splits, splits_of
from hf_paged.kernels.rows import ALL, PagedRows
from hf_paged.kernels.seen import Seen

# Fields of an item, int32:
#   row: line of the page table.
#   token, count: its first query among the step's, and how many it has.
#   own: slots that its first query sees (the next sees one more).
#   start, clear, full, stop: slots that it reads; all its queries see those from clear to full. Multiples of block_n,
#       but for stop.
#   part: its first line among the parts; -1: it is no part.
#   first, parts, tile: the tile's first line, how many parts it has, its number: who ends last merges them.
FIELDS = 12


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor there; on CUDA nothing waits for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, eq=False)
class StepTensors:
    """The page table and the context of every row: int32 `[rows, width]` and `[rows]`.

    `order` and `common`: which decodes share pages, as `shared_pages` says; None where that is not looked at.
    """

    table: torch.Tensor
    context: torch.Tensor
    order: torch.Tensor | None = None
    common: torch.Tensor | None = None


def step_tensors(rows: PagedRows, device: torch.device) -> StepTensors:
    """One copy for all."""
    (count, width), n = rows.page_table.shape, rows.num_decodes
    shared = shared_pages(rows.page_table[:n], rows.context_lens[:n], rows.page_size) if rows.grouped else None
    packed = np.concatenate([*(shared or ()), rows.context_lens, rows.page_table.reshape(-1)]).astype(np.int32)
    packed, parts = to_device(packed, device), []
    if shared is not None:
        parts, packed = [packed[:n], packed[n : 2 * n]], packed[2 * n :]
    return StepTensors(packed[count:].view(count, width), packed[:count], *parts)


# Slots that rows have in common with others, in all and of all slots, from which reading them once pays (on an H200).
LEAST_SHARED, LEAST_SHARE = 1 << 17, 0.5


def shared_pages(table: np.ndarray, context: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows in such an order that those with the same first pages stand side by side.

    Args:
        table: pages of each row, int `[rows, width]`. context: int `[rows]`, slots that each row sees.

    Returns:
        order, common, int32 `[rows]`: the rows, and how many whole pages each has in common with the one before it.
        None where these are too few to care.
    """
    rows, width = table.shape
    if rows < 2 or context.sum() < LEAST_SHARED or len(np.unique(table[:, 0])) == rows:
        return None
    table = np.ascontiguousarray(table, np.int32)
    # As strings of bytes: any order will do that has equal beginnings side by side.
    order = np.argsort(table.view(np.dtype((np.void, 4 * width))).ravel(), kind="stable").astype(np.int32)
    unlike = table[order[1:]] != table[order[:-1]]
    alike = np.where(unlike.any(1), unlike.argmax(1), width)
    whole = context[order] // page_size
    common = np.zeros(rows, np.int32)
    common[1:] = np.minimum(alike, np.minimum(whole[1:], whole[:-1]))
    if common.sum() * page_size < max(LEAST_SHARED, LEAST_SHARE * context.sum()):
        return None
    return order, common


@dataclass(frozen=True, eq=False)
class WorkList:
    """What `extend` computes.

    Attributes:
        items: int32 `[n, 12]`, most work first.
        lines: lines of all parts.
        arrived: int32 `[tiles, kv_heads, 2]`, zeros: parts that are done, while a kernel runs; of each half of a
            tile where a kernel takes it in two.
        seen: int64 `[tokens, 4]`, low, high, base and visible bits of each query; None where no drafts branch.
    """

    items: torch.Tensor
    lines: int
    arrived: torch.Tensor
    seen: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Tiles of queries, arrays int64 `[tiles]`; fields as those of an item. `of_row`: how many tiles the row has."""

    row: np.ndarray
    token: np.ndarray
    count: np.ndarray
    own: np.ndarray
    of_row: np.ndarray


def _tiles(rows: PagedRows, chosen: np.ndarray, queries: int) -> _Tiles:
    """The chosen rows' queries, `queries` at a time."""
    lens = rows.query_lens[chosen]
    counts = -(-lens // queries)
    at = np.repeat(np.arange(len(chosen)), counts)
    first = (np.arange(len(at)) - (np.cumsum(counts) - counts)[at]) * queries
    starts = (np.cumsum(rows.query_lens) - rows.query_lens)[chosen]
    own = (rows.context_lens[chosen] - lens)[at] + first + 1
    return _Tiles(chosen[at], starts[at] + first, np.minimum(queries, lens[at] - first), own, counts[at])


def _ranges(
    tiles: _Tiles, block: int, window: int | None, seen: Seen | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """start, clear, full and stop of every tile."""
    stop = tiles.own + tiles.count - 1
    low = high_low = np.zeros_like(stop)
    full = tiles.own
    if window is not None:
        low, high_low = np.maximum(tiles.own - window, 0), np.maximum(stop - window, 0)
    if seen is not None:
        edges = np.stack([tiles.token, tiles.token + tiles.count], 1).reshape(-1)
        full = _of_tiles(np.minimum, np.where(seen.visible == ALL, seen.context, seen.base), edges)
        if window is not None:
            low = _of_tiles(np.minimum, seen.begin, edges)
            high_low = _of_tiles(np.maximum, seen.begin, edges)
    start, clear, full = low // block * block, -(-high_low // block) * block, full // block * block
    none = clear >= full
    return start, np.where(none, start, clear), np.where(none, start, full), stop


def _of_tiles(best: np.ufunc, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The least or largest value of each tile's queries; `edges`: first query and last + 1, tile by tile."""
    return best.reduceat(np.append(values, values[-1:]), edges)[::2]


def build_work(
    rows: PagedRows,
    chosen: np.ndarray,
    config: TileConfig,
    group: int,
    enough: int,
    window: int | None,
    seen: Seen | None,
) -> tuple[np.ndarray, int, int]:
    """Items (see `WorkList`), lines and tiles of the chosen rows.

    A row of `t` tiles has a part for `t * config.split` slots, give or take half of that: few queries over many slots
    are many programs as well, and parts stay few. Which, depends on the row alone.

    Args:
        chosen: int64, places of rows. enough: parts with which a tile occupies the card by itself.
        seen: what each query of the step sees, where drafts branch.
    """
    tiles = _tiles(rows, chosen, config.block_m // group)
    start, clear, full, stop = _ranges(tiles, config.block_n, window, seen)
    size = config.split * tiles.of_row
    slots = stop - start
    parts = splits_of(slots, size, -(-enough // tiles.of_row))
    lines = np.where(parts > 1, parts * tiles.count, 0)
    line = np.cumsum(lines) - lines
    at = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(at)) - (np.cumsum(parts) - parts)[at]
    # As many blocks to each part, the first ones take what is left over.
    each, over = np.divmod(-(-slots // config.block_n), parts)
    begin = start[at] + (number * each[at] + np.minimum(number, over[at])) * config.block_n
    end = np.minimum(begin + (each[at] + (number < over[at])) * config.block_n, stop[at])
    part = np.where(parts[at] > 1, line[at] + number * tiles.count[at], -1)
    clear, full = (np.clip(edge[at], begin, end) for edge in (clear, full))
    fields = [tiles.row[at], tiles.token[at], tiles.count[at], tiles.own[at], begin, clear, full, end, part]
    items = np.stack([*fields, line[at], parts[at], at], 1)[np.argsort(begin - end, kind="stable")]
    return items, int(lines.sum()), len(parts)


def work_list(
    rows: PagedRows,
    chosen: np.ndarray,
    config: TileConfig,
    shape: HeadShape,
    window: int | None,
    seen: Seen | None,
    device: torch.device,
) -> WorkList | None:
    """`build_work` on the device, one copy; None where no chosen row has a query."""
    enough = full_splits(shape, target_of(device))
    items, lines, tiles = build_work(rows, chosen, config, shape.group, enough, window, seen)
    if not len(items):
        return None
    mask = None
    if seen is not None:
        begin = np.zeros_like(seen.context) if seen.begin is None else seen.begin
        mask = to_device(np.stack([begin, seen.context, seen.base, seen.visible], 1), device)
    arrived = torch.zeros(tiles if lines else 0, shape.kv_heads, 2, dtype=torch.int32, device=device)
    return WorkList(to_device(items.astype(np.int32), device), lines, arrived, mask)
