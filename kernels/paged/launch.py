"""How the Triton kernels are launched: shape, dtype and card → tile sizes, splits, warps, stages. Pure functions.

Nothing here but `fetches_ahead`, which changes no bit, depends on how many rows a step has: a row's result must not
depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

KIB = 1024
# Shared memory that one program may have.
SHARED = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB}
SHARED |= {"sm_75": 64 * KIB, "sm_120": 99 * KIB}
LEAST_SHARED = 64 * KIB  # of cards that are not named: gfx942 has it, and so have Intel's
LARGEST_BYTES = 1024  # of a head's key or value
LARGEST_GROUP = 128  # query heads a KV head


@dataclass(frozen=True)
class Target:
    """A card: `cuda`, `hip` or `xpu`, its architecture (`sm_90`, `gfx942`, ...) and how many processors it has."""

    backend: str
    arch: str
    processors: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may have."""
        if self.backend != "cuda" or self.arch in SHARED:
            return SHARED.get(self.arch, LEAST_SHARED)
        return SHARED["sm_90"] if self.arch.startswith(("sm_10", "sm_11")) else SHARED["sm_86"]


@dataclass(frozen=True)
class HeadShape:
    """Attention of one layer: `group` query heads a KV head, of `kv_heads`; elements of `itemsize` bytes."""

    group: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    page_size: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's key and value in a tile."""
        return (padded(self.key_dim) + padded(self.value_dim)) * self.itemsize


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is launched.

    Attributes:
        block_m: lines of a tile: queries times query heads a KV head.
        block_n: slots of a tile.
        split: slots that one program reads of a row's, about (see `splits_of`, `splits.py`); a multiple of `block_n`.
        warps, stages: as Triton has them.
        precision: of products of float32.
    """

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    precision: str = "ieee"


@dataclass(frozen=True)
class ProductConfig:
    """How a product of a few lines is launched: `block_n` outputs a program, over `block_k` inputs at once."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def reads_fp8(target: Target) -> bool:
    """Whether the kernels take KV in e4m3 there: NVIDIA's cards convert it from sm_89 on."""
    return target.backend == "cuda" and int(target.arch[3:]) >= 89


def overlaps(target: Target) -> bool:
    """Whether a kernel may start there before the one ahead of it has ended."""
    return target.backend == "cuda" and int(target.arch[3:]) >= 90


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def padded(dim: int) -> int:
    """Elements of a head in a tile: what Triton's products take."""
    return max(16, power_of_two(dim))


def head_shape(heads: int, key_pages: torch.Tensor, value_pages: torch.Tensor, itemsize: int = 0) -> HeadShape:
    """Shape of the attention of `heads` query heads over a layer's pages.

    Args:
        itemsize: of the query, as which keys and values are computed with. Default: that of the pages.
    """
    _, kv_heads, size, key_dim = key_pages.shape
    itemsize = itemsize or key_pages.element_size()
    return HeadShape(heads // kv_heads, kv_heads, key_dim, value_pages.shape[-1], itemsize, size)


def tile_constants(shape: HeadShape, config: TileConfig) -> dict:
    """What every kernel that works on tiles is compiled for."""
    return {
        "GROUP": shape.group,
        "KV_HEADS": shape.kv_heads,
        "PAGE_SIZE": shape.page_size,
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded(shape.key_dim),
        "BLOCK_V": padded(shape.value_dim),
        "PRECISION": config.precision,
        "STAGES": config.stages,
    }


def unsupported(shape: HeadShape) -> str | None:
    """Why the kernels do not take this shape; None where they do."""
    if shape.page_size & (shape.page_size - 1):
        return f"page_size {shape.page_size} is not a power of two"
    largest = max(shape.key_dim, shape.value_dim)
    if largest * shape.itemsize > LARGEST_BYTES:
        return f"head_dim {largest} is over {LARGEST_BYTES // shape.itemsize}"
    if shape.group > LARGEST_GROUP:
        return f"{shape.group} query heads a KV head are more than {LARGEST_GROUP}"
    return None


def tile_bytes(shape: HeadShape, block_m: int, block_n: int, stages: int) -> int:
    """Shared memory of one program, at most: tiles of keys and values in flight, queries, weights."""
    held = block_m * (padded(shape.key_dim) + block_n) * shape.itemsize
    return stages * block_n * shape.slot_bytes + held


def _fit(shape: HeadShape, target: Target, block_m: int, block_n: int, stages: int) -> tuple[int, int]:
    """`block_n` and `stages`, smaller until a program's tiles lie in shared memory."""
    while tile_bytes(shape, block_m, block_n, stages) > target.shared and (stages > 1 or block_n > 16):
        if stages > 2 or block_n == 16:
            stages -= 1
        else:
            block_n //= 2
    return block_n, stages


def decode_config(shape: HeadShape, target: Target) -> TileConfig:
    """One query a row: memory is what counts. Tiles of 32 KiB, of which several are on their way.

    Two warps that have nothing to exchange keep up with memory, and leave room for three programs a processor.
    """
    block_m = max(16, power_of_two(shape.group))
    weights = 16 * KIB if shape.itemsize <= 2 else 8 * KIB  # of a tile, which are held in registers
    block_n = min(128, power_of_two(32 * KIB // shape.slot_bytes), weights // (block_m * shape.itemsize))
    stages = 2 if target.backend != "cuda" else 4 if overlaps(target) and target.shared > 200 * KIB else 3
    block_n, stages = _fit(shape, target, block_m, max(16, block_n), stages)
    split = min(1024, max(128, power_of_two(32 * KIB * shape.kv_heads // (2 * target.processors))))
    config = TileConfig(block_m, block_n, max(split, block_n), 2, stages, _precision(shape, target))
    if shares(shape, config, target) == 1:
        config = replace(config, warps=4 if shape.slot_bytes <= 256 * shape.itemsize and block_m < 32 else 8)
    return config


def with_softcap(config: TileConfig) -> TileConfig:
    """What `decode` takes instead where scores are capped: two warps would be short of registers."""
    return replace(config, warps=max(4, config.warps))


def full_splits(shape: HeadShape, target: Target, programs: int = 1) -> int:
    """Splits of a row with which it occupies the card by itself, so many programs a processor."""
    return max(1, target.processors * programs // shape.kv_heads)


def decode_programs(target: Target, narrow: bool) -> int:
    """Programs of `decode` a processor that occupy the card: two where kernels overlap, since the next one's take their
    places as they end; and over fp8 (`narrow`), where one cannot keep up with memory."""
    return 2 if narrow or overlaps(target) else 1


def splits_of(slots: int | np.ndarray, split: int | np.ndarray, full: int | np.ndarray) -> np.ndarray:
    """How many splits a row of `slots` has: one for `split` slots, give or take half of that; where `full` are enough
    to occupy the card, they may have twice as many slots. (For `extend`; those of `decode` are in `splits.py`.)"""
    most = np.maximum(full, (slots + split) // (2 * split))
    return np.maximum(np.minimum((slots + split // 2) // split, most), 1)


def shares(shape: HeadShape, config: TileConfig, target: Target) -> int:
    """Parts of a tile of `decode` that have a softmax of their own: one a warp, or 1.

    For heads of a power of two of elements and up to 8 query heads a KV head: others take more registers than there
    are, and so do AMD's products of so few columns.
    """
    whole = shape.key_dim == padded(shape.key_dim) and shape.value_dim == padded(shape.value_dim)
    small = shape.group <= 8 and shape.slot_bytes <= KIB // 2
    fits = config.block_n >= 16 * config.warps and target.backend == "cuda"
    return config.warps if whole and small and fits else 1


def _halvable(shape: HeadShape, config: TileConfig, target: Target, itemsize: int) -> bool:
    """Whether programs of `decode` over pages in fp8 may take half a processor's memory each.

    Heads are of 128 values and 3 to 8 a KV head: so in either kernel that merges, a thread has all parts of what it
    sums. (On later cards, where nobody has measured it, it takes too many registers.)
    """
    numbers = padded(shape.key_dim) + padded(shape.value_dim)  # of a slot, a byte each
    room = config.stages > 3 and (config.stages - 1) * 2 * config.block_n * numbers + 12 * KIB <= target.shared // 2
    alike = shape.value_dim == 128 and shape.key_dim <= 128 and power_of_two(shape.group) in (4, 8)
    return target.arch == "sm_90" and shares(shape, config, target) == 2 and alike and room and itemsize == 2


def fetches_ahead(shape: HeadShape, config: TileConfig, target: Target, itemsize: int, programs: int) -> bool:
    """Whether so many programs of `decode` over pages in fp8 are taken by `tiles_ahead.py` or `tiles_halved.py`, and
    their parts merged by `merge.py`: where there are two a processor at most, of one row or a few. The sums are the
    same to the bit.

    Each takes half a processor's memory, so that one of the next kernel takes its place as it ends; of more programs,
    some would have to wait for that.

    Args:
        itemsize: of a query's elements; those of 4 bytes are not computed with in float16.
    """
    return _halvable(shape, config, target, itemsize) and programs <= 2 * target.processors


def halved(shape: HeadShape, config: TileConfig, target: Target, itemsize: int) -> bool:
    """Whether the halves of a split of `decode`, over pages in fp8 without a window and caps, have sums of their own,
    so that few programs may read them side by side (`tiles_halved.py`); see `fetches_ahead`.

    Of 3 or 4 heads a KV head: queries for both halves are then the eight columns that a product has at least. (With
    twice as many columns, many programs are 8 % slower.)
    """
    return _halvable(shape, config, target, itemsize) and power_of_two(shape.group) == 4


def extend_config(shape: HeadShape, target: Target, few: bool) -> TileConfig:
    """Several queries a row. `few`: of `few_lines` at most, mostly tokens to verify; memory counts there too."""
    half = shape.itemsize <= 2
    large = max(padded(shape.key_dim), padded(shape.value_dim)) > 128
    if few:
        block_m = max(few_lines(shape, target), power_of_two(shape.group))
        block_n = max(16, min(64, power_of_two(32 * KIB // shape.slot_bytes)))
        stages, warps = 3, 4 if shape.slot_bytes <= KIB else 8
    else:
        block_m = max(32 if not half else 64 if large else 128, power_of_two(shape.group))
        block_n = 64 if half and not large else 32
        stages, warps = 3, 8 if half or shape.slot_bytes > KIB else 4
    if target.backend != "cuda":
        stages = 2
    block_n, stages = _fit(shape, target, block_m, block_n, stages)
    return TileConfig(block_m, block_n, 1024, warps, stages, _precision(shape, target))


def prefill_config(shape: HeadShape, target: Target) -> TileConfig | None:
    """Many queries a row on Hopper, by `prefill.py`; None for other cards and for shapes that it does not take."""
    half = shape.itemsize == 2 and shape.key_dim == shape.value_dim and shape.key_dim in (64, 128)
    return TileConfig(128, 128, 1024, 4, 2) if half and target.arch == "sm_90" else None


def few_lines(shape: HeadShape, target: Target) -> int:
    """Lines (queries times query heads a KV head) up to which a row's queries are few."""
    return 64 if shape.itemsize <= 2 else 16


FEW_LINES = 64  # of a product: up to so many, reading the weights is what takes time


def product_config(outs: int, inner: int, lines: int, weights: int, target: Target) -> ProductConfig:
    """Products of `lines` lines, at most `FEW_LINES`, with weights of 2 bytes an element.

    Blocks do not depend on `lines`, so a line's sums do not either; as many are on their way as there is room for.

    Args:
        outs: outputs of all programs. weights: how many weights a program reads, 2 for a gated MLP.
    """
    block_n = next(size for size in (64, 32, 16) if 4 * outs >= size * target.processors or size == 16)
    block_k = (
        (8 if target.shared > LEAST_SHARED else 4) * KIB // block_n
    )  # 16 KiB of a weight: rows of 256 bytes or more
    held = block_k * (weights * block_n + max(16, power_of_two(lines))) * 2
    most = 6 if target.backend == "cuda" else 2
    stages = max(1, min(most, target.shared // held, -(-inner // block_k)))
    return ProductConfig(block_n, block_k, 4, stages)


def _precision(shape: HeadShape, target: Target) -> str:
    """Of products of float32.

    NVIDIA's matrix units have none: three of TF32 are as good (Ootomo and Yokota, 2022). Exact ones, made of scalar
    products, keep whole tiles in registers and spill by kilobytes.
    """
    return "tf32x3" if shape.itemsize == 4 and target.backend == "cuda" else "ieee"
