"""Decode: one query token a row over its page table, in splits of about as many slots.

Dao et al., "Flash-Decoding", 2023. The query heads of a KV head make one tile (Ainslie et al., "GQA", 2023), so keys
and values are read once. How a row is split depends on the row alone, so its result does not depend on the batch.
"""

from __future__ import annotations

import torch

from hf_paged.kernels.card import target_of
from hf_paged.kernels.decode_kernel import decode_kernel
from hf_paged.kernels.fp8 import FP8
from hf_paged.kernels.launch import (
    HeadShape,
    Target,
    TileConfig,
    decode_programs,
    fetches_ahead,
    full_splits,
    halved,
    head_shape,
    overlaps,
    power_of_two,
    shares,
    tile_constants,
    with_softcap,
)
from hf_paged.kernels.merge import merge_parts, merging_constants
from hf_paged.kernels.overlap import overlap
from hf_paged.kernels.reduce import merge_constants, part_buffers
from hf_paged.kernels.splits import most_splits
from hf_paged.kernels.tiles import scaling


def decode(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    table: torch.Tensor,
    context: torch.Tensor,
    out: torch.Tensor,
    arrived: torch.Tensor,
    config: TileConfig,
    *,
    shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    longest: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one query a row, into `out`.

    Args:
        query: `[rows, heads, head_dim]`, elements of a head one after another.
        key_pages, value_pages: `[num_pages, kv_heads, page_size, dim]`, contiguous.
        table: int32 `[rows, width]`, contiguous; read only as far as a row's slots go.
        context: int32 `[rows]`, slots that each row sees; a row of 0 gets zeros.
        out: `[rows, heads, value_dim]`, contiguous.
        arrived: int32, `rows * kv_heads` zeros, which are left so; calls that share them must follow each other.
        shared: which rows have pages in common, `(order, common)`, int32 `[rows]` (see `shared_pages`).
        longest: at least the largest of `context`: the grid holds splits for so many slots.
    """
    rows, heads, _ = query.shape
    _, kv_heads, _, value_dim = value_pages.shape
    seen = longest if window is None else min(longest, window + config.block_n)
    shape = head_shape(heads, key_pages, value_pages)
    target = target_of(query.device)
    config = config if softcap is None else with_softcap(config)
    narrow = key_pages.dtype == FP8
    splits = most_splits(
        seen, config.split, full_splits(shape, target, decode_programs(target, narrow)), config.block_n
    )
    parts, stats = part_buffers(rows * splits if splits > 1 else 0, heads, value_dim, query.device)
    chosen = dict(windowed=window is not None, sinks=sinks is not None, shared=shared is not None and splits > 1)
    plain = narrow and window is None and softcap is None
    programs = rows * kv_heads * splits
    few = plain and not chosen["shared"] and splits > 1
    few = few and fetches_ahead(shape, config, target, query.element_size(), programs)
    halves = plain and halved(shape, config, target, query.element_size())
    chosen |= dict(capped=softcap is not None, narrow=narrow, halves=halves, ahead=few)
    constants = decode_constants(shape, config, target, **chosen)
    given = query, key_pages, value_pages, table, context, out if sinks is None else sinks  # for what is not read
    sizes = rows, table.shape[1], splits, window or 0, *scaling(scale, softcap), *query.stride()[:2]
    common = shared or (context, context)
    warps = 2 * config.warps if few and halves else config.warps  # so many for each half of a split
    launched = dict(**overlap(query.device), num_warps=warps, num_stages=config.stages)
    decode_kernel[(programs,)](*given, out, parts, stats, arrived, *common, *sizes, **constants, **launched)
    if few:
        merging = merging_constants(shape, config, constants["FULL"], sinks is not None)
        merge_parts(context, sinks, out, parts, stats, merging)


def decode_constants(
    shape: HeadShape,
    config: TileConfig,
    target: Target,
    *,
    windowed: bool,
    capped: bool,
    sinks: bool,
    narrow: bool = False,
    halves: bool = False,
    shared: bool = False,
    ahead: bool = False,
) -> dict:
    """What `decode_kernel` is compiled for. `narrow`: for pages in fp8. `halves`: see `halved`. `shared`: rows may have
    splits in common. `ahead`: programs are few, see `fetches_ahead`.

    These are read once where warps share a tile, and there is no window, which begins elsewhere in each row.
    """
    parts = shares(shape, config, target)
    shared = shared and parts > 1 and not windowed
    columns = 16 if shared and overlaps(target) else 8  # on other cards 16 take more registers than there are
    if halves and not ahead:
        columns //= 2  # each stands there twice
    block_m = columns if parts > 1 else config.block_m
    return {
        **tile_constants(shape, config),
        **merge_constants(shape),
        "BLOCK_M": block_m,
        "MEMBERS": block_m // power_of_two(shape.group) if shared else 1,
        "SPLIT": config.split,
        "FULL": full_splits(shape, target, decode_programs(target, narrow)),
        "SHARES": parts,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SINKS": sinks,
        "HALVES": halves,
        "AHEAD": ahead,
    }
