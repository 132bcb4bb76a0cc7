"""Between two decode steps of a graph: what was drawn becomes what is computed next."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_paged.kernels.launch import power_of_two


@triton.jit
def advance_kernel(
    out, ids, positions, slots, context, table, rows, width, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """All rows, in one program. A row without context stays as it is; no token (under 0) is fed as token 0."""
    row = tl.arange(0, BLOCK)
    there = row < rows
    seen = tl.load(context + row, mask=there, other=0)
    live = there & (seen > 0)
    token = tl.load(out + row, mask=live, other=0)
    tl.store(ids + row, tl.maximum(token, 0).to(tl.int64), mask=live)
    tl.store(positions + row, seen.to(tl.int64), mask=live)
    tl.store(context + row, seen + 1, mask=live)
    page = tl.load(table + row * width + tl.minimum(seen // PAGE_SIZE, width - 1), mask=live, other=0)
    tl.store(slots + row, page.to(tl.int64) * PAGE_SIZE + seen % PAGE_SIZE, mask=live)


def advance(
    out: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context: torch.Tensor,
    table: torch.Tensor,
    page_size: int,
) -> None:
    """Move rows on by a token, in place.

    Args:
        out: int32 `[2, rows]`, see `draw`.
        ids, positions, slots: int64 `[rows]`. context: int32 `[rows]`, slots seen, 0 for no row.
        table: int32 `[rows, width]`.
    """
    rows, width = table.shape
    constants = {"PAGE_SIZE": page_size, "BLOCK": power_of_two(rows)}
    advance_kernel[(1,)](out, ids, positions, slots, context, table, rows, width, **constants)
