"""Prefill on Hopper: `extend` for rows of many queries, with warps that have different tasks.

Two groups of four warps attend for half of a tile's lines each: while one takes the exponentials of its scores, the
other multiplies. A third group fetches keys and values ahead of them. Within a group, a block's values are weighted
while the next block's scores are computed. Shah et al., "FlashAttention-3", 2024.

Written in Gluon, Triton's lower level: Triton itself does not part warps on Hopper. It has no interpreter; the tests on
a GPU hold this kernel against the reference, and `extend` is what runs where it does not compile.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_paged.kernels.launch import HeadShape, TileConfig, head_shape
from hf_paged.kernels.prefill_steps import (
    FETCHERS,
    HALF,
    fetch,
    finish,
    follow,
    in_rows,
    of_products,
    release,
    sync,
    weigh,
)
from hf_paged.kernels.reduce import part_buffers
from hf_paged.kernels.tiles import scaling
from hf_paged.kernels.worklist import WorkList

# Registers of a thread of the second group and of one that fetches; the first group has as many as the second.
REGISTERS = gl.constexpr([208, 88])


@gluon.jit
def attend_half(
    given, buffers, WHICH: gl.constexpr,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WINDOWED: gl.constexpr, CAPPED: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Attention of one half of a tile's lines."""
    query, results, item, head, window, scale, cap, stride_token, stride_head = given
    queries, keys, values, ready, free = buffers
    s_layout: gl.constexpr = of_products(BLOCK_N)
    o_layout: gl.constexpr = of_products(DIM)
    layout: gl.constexpr = in_rows(DIM)
    token = gl.load(item + 1)
    count = gl.load(item + 2)
    own = gl.load(item + 3)
    start = gl.load(item + 4)
    full = gl.load(item + 6)
    stop = gl.load(item + 7)
    m = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    d = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    tokens = (token + m // GROUP).to(gl.int64)
    heads = head * GROUP + m % GROUP
    at = tokens * stride_token + heads * stride_head
    tile = gl.load(query + at[:, None] + d[None, :], mask=(m // GROUP < count)[:, None], other=0.0)
    mine = queries.index(WHICH)
    mine.store(tile)
    fence_async_shared()
    sync()
    lines = WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, s_layout))
    high = gl.where(lines // GROUP < count, own + lines // GROUP, own)
    low = high - window
    acc = gl.zeros([HALF, DIM], gl.float32, o_layout)
    most = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, s_layout))
    nothing = gl.zeros([HALF, BLOCK_N], gl.float32, s_layout)
    mbarrier.wait(ready.index(0), 0)
    fence_async_shared()
    scores = warpgroup_mma(mine, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    release(free, 0)
    first, fade, most, total = weigh(scores, most, total, start, low, high, scale, cap, BLOCK_N, True, WINDOWED, CAPPED)
    weights = gl.convert_layout(first.to(mine.dtype), gl.DotOperandLayout(0, o_layout, 2))
    blocks = gl.cdiv(stop - start, BLOCK_N)
    clear = 1
    if not WINDOWED:
        clear = gl.maximum((full - start) // BLOCK_N, 1)
        for block in range(1, clear):
            weights, acc, most, total = follow(
                block, buffers, mine, weights, acc, most, total, start, low, high, scale, cap,
                DIM, BLOCK_N, STAGES, False, False, CAPPED,
            )  # fmt: skip
    for block in range(clear, blocks):
        weights, acc, most, total = follow(
            block, buffers, mine, weights, acc, most, total, start, low, high, scale, cap,
            DIM, BLOCK_N, STAGES, True, WINDOWED, CAPPED,
        )  # fmt: skip
    last = blocks - 1
    mbarrier.wait(ready.index(STAGES + last % STAGES), (last // STAGES) & 1)
    fence_async_shared()
    sums = warpgroup_mma(weights, values.index(last % STAGES), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
    most = gl.convert_layout(most, gl.SliceLayout(1, o_layout))
    total = gl.convert_layout(total, gl.SliceLayout(1, o_layout))
    finish(acc, most, total, results, item, head, WHICH, GROUP, KV_HEADS, DIM, SINKS)


@gluon.jit(do_not_specialize=["width", "window"])
def prefill_kernel(
    query, key_pages, value_pages, table, items, sinks, out, parts, stats, arrived,
    width, window, scale, cap, stride_token, stride_head,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """One item of the work list (`worklist.py` has its fields) and one KV head. `parts`, `stats`: as `extend_kernel`
    has them; `arrived` int32 `[tiles, kv_heads, 2]`, a number for each half."""
    pid = gl.program_id(0)
    head = pid % KV_HEADS
    item = items + (pid // KV_HEADS) * 12
    line = table + gl.load(item).to(gl.int64) * width
    start = gl.load(item + 4)
    stop = gl.load(item + 7)
    least = start
    if WINDOWED:
        least = gl.load(item + 3) - window
    dtype: gl.constexpr = query.dtype.element_ty
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, DIM], dtype)
    block: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], dtype)
    queries = gl.allocate_shared_memory(dtype, [2, HALF, DIM], half)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], block)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], block)
    # Keys' stages, then values': a block has been fetched; a block has been read by both halves.
    ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2 * STAGES):
        mbarrier.init(ready.index(place), count=FETCHERS)
        mbarrier.init(free.index(place), count=2)
    buffers = (queries, keys, values, ready, free)
    results = (sinks, out, parts, stats, arrived)
    given = (query, results, item, head, window, scale, cap, stride_token, stride_head)
    keys_of = key_pages + head * (PAGE_SIZE * DIM)
    values_of = value_pages + head * (PAGE_SIZE * DIM)
    pages_of = (keys_of, values_of, line, start, stop, least)
    gl.warp_specialize(
        [
            (attend_half, (given, buffers, 0, GROUP, KV_HEADS, DIM, BLOCK_N, STAGES, WINDOWED, CAPPED, SINKS)),
            (attend_half, (given, buffers, 1, GROUP, KV_HEADS, DIM, BLOCK_N, STAGES, WINDOWED, CAPPED, SINKS)),
            (fetch, (pages_of, buffers, KV_HEADS, PAGE_SIZE, DIM, BLOCK_N, STAGES)),
        ],
        [4, 4],
        REGISTERS,
    )


def prefill(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    table: torch.Tensor,
    work: WorkList,
    out: torch.Tensor,
    config: TileConfig,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """As `extend`, where `launch.prefill_config` gives the `config`, and no drafts branch."""
    heads = query.shape[1]
    parts, stats = part_buffers(work.lines, heads, value_pages.shape[-1], query.device)
    shape = head_shape(heads, key_pages, value_pages)
    kept = work.items, out if sinks is None else sinks, out, parts, stats, work.arrived
    prefill_kernel[(len(work.items) * shape.kv_heads,)](
        query,
        key_pages,
        value_pages,
        table,
        *kept,
        table.shape[1],
        window or 0,
        *scaling(scale, softcap),
        *query.stride()[:2],
        **prefill_constants(
            shape, config, windowed=window is not None, capped=softcap is not None, sinks=sinks is not None
        ),
        num_warps=config.warps,
    )


def prefill_constants(shape: HeadShape, config: TileConfig, *, windowed: bool, capped: bool, sinks: bool) -> dict:
    """What `prefill_kernel` is compiled for."""
    return {
        "GROUP": shape.group,
        "KV_HEADS": shape.kv_heads,
        "PAGE_SIZE": shape.page_size,
        "DIM": shape.key_dim,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SINKS": sinks,
    }
