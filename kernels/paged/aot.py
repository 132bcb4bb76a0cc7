"""Compile the kernels for cards that are not there: `python -m hf_paged.kernels.aot`.

For every configuration that `launch.py` chooses: registers, bytes of shared memory, bytes that spill. Triton ships the
compilers for NVIDIA's and AMD's cards; no device is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from hf_paged.kernels.advance import advance_kernel
from hf_paged.kernels.decode import decode_constants
from hf_paged.kernels.decode_kernel import decode_kernel
from hf_paged.kernels.draw import BLOCK, WARPS, draw_kernel
from hf_paged.kernels.extend import extend_constants, extend_kernel
from hf_paged.kernels.gate import GATE_BLOCK, gate_kernel
from hf_paged.kernels.launch import (
    FEW_LINES,
    HeadShape,
    Target,
    decode_config,
    extend_config,
    fetches_ahead,
    halved,
    overlaps,
    prefill_config,
    product_config,
    reads_fp8,
    with_softcap,
)
from hf_paged.kernels.merge import merge_kernel, merging_constants
from hf_paged.kernels.prefill import prefill_constants, prefill_kernel
from hf_paged.kernels.product import product_constants, product_kernel
from hf_paged.kernels.rms_norm import norm_constants, norm_warps, rms_norm_kernel
from hf_paged.kernels.rotate import rotate_constants, rotate_kernel, rotate_warps
from hf_paged.kernels.write_triton import write_constants, write_kernel

TARGETS = {
    "sm_80": Target("cuda", "sm_80", 108),
    "sm_90": Target("cuda", "sm_90", 132),
    "sm_100": Target("cuda", "sm_100", 148),
    "gfx942": Target("hip", "gfx942", 304),
}
# Arguments that are no constants, by kernel: `T` is the model's dtype, `P` that of the pages; `/16` says that
# it is a multiple of 16.
_TILES = "scale:fp32 cap:fp32 stride_token:i32/16 stride_head:i32/16"
ARGUMENTS = {
    "decode": "query:*T key_pages:*P value_pages:*P table:*i32 context:*i32 sinks:*T out:*T parts:*fp32 stats:*fp32 "
    "arrived:*i32 order:*i32 common:*i32 rows:i32 width:i32 splits:i32 window:i32 " + _TILES,
    "extend": "query:*T key_pages:*P value_pages:*P table:*i32 items:*i32 seen:*i64 sinks:*T out:*T parts:*fp32 "
    "stats:*fp32 arrived:*i32 width:i32 window:i32 " + _TILES,
    "draw": "logits:*T line:i32 vocab:i32 rows:i32 temperatures:*fp32 limits:*fp32 min_ps:*fp32 top_ks:*i64 seeds:*i64 "
    "positions:*i64 listed:*i32 out:*i32",
    "advance": "out:*i32 ids:*i64 positions:*i64 slots:*i64 context:*i32 table:*i32 rows:i32 width:i32",
    "merge": "context:*i32 sinks:*T out:*T parts:*fp32 stats:*fp32 splits:i32",
    "gate": "gate:*T up:*T out:*T size:i32",
    "prefill": "query:*T key_pages:*T value_pages:*T table:*i32 items:*i32 sinks:*T out:*T parts:*fp32 stats:*fp32 "
    "arrived:*i32 width:i32 window:i32 " + _TILES,
    "product": "x:*T first:*T second:*T third:*T first_bias:*T second_bias:*T third_bias:*T other:*T out:*T lines:i32 "
    "stride:i32/16",
    "rms_norm": "x:*T weight:*T out:*T stride:i32 eps:fp32",
    "rotate": "query:*T key:*T value:*T query_weight:*T key_weight:*T cosines:*T sines:*T slots:*i64 new_query:*T "
    "new_key:*T key_pages:*P value_pages:*P query_token:i32 key_token:i32 value_token:i32 query_eps:fp32 key_eps:fp32",
    "write": "key:*T value:*T key_pages:*P value_pages:*P slots:*i64 key_token:i32/16 key_head:i32/16 "
    "value_token:i32/16 value_head:i32/16",
}
KERNELS = {
    "advance": advance_kernel,
    "decode": decode_kernel,
    "draw": draw_kernel,
    "extend": extend_kernel,
    "gate": gate_kernel,
    "merge": merge_kernel,
    "prefill": prefill_kernel,
    "product": product_kernel,
    "rms_norm": rms_norm_kernel,
    "rotate": rotate_kernel,
    "write": write_kernel,
}

# Inputs, outputs of each layer, whether they have a bias, whether something is added, whether it is a gated MLP's.
PRODUCTS = (
    (4096, [4096, 1024, 1024], False, False, False),
    (4096, [14336, 14336, 0], False, False, True),
    (14336, [4096, 0, 0], False, True, False),
    (896, [896, 128, 128], True, False, False),
    (896, [4864, 4864, 0], True, False, True),
)


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled: `constants` as sorted pairs, `dtype` `bf16`, `fp16` or `fp32`, `pages` the same or
    `fp8e4nv`."""

    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    pages: str


@dataclass(frozen=True)
class Compiled:
    """What a variant came to on a card. `registers` a thread, `spilled` bytes a thread (None: not told)."""

    target: str
    variant: Variant
    shared: int
    registers: int | None
    spilled: int | None

    @property
    def fits(self) -> bool:
        return self.shared <= TARGETS[self.target].shared


def variants(shape: HeadShape, target: Target) -> Iterator[Variant]:
    """All kernels that this shape takes on a card: plain, and with everything that can be asked for."""
    dtype = "bf16" if shape.itemsize == 2 else "fp32"

    def made(kernel: str, constants: dict, warps: int = 4, stages: int = 3, pages: str = dtype) -> Variant:
        return Variant(kernel, dtype, tuple(sorted(constants.items())), warps, stages, pages)

    config = decode_config(shape, target)
    configs = {few: extend_config(shape, target, few) for few in (True, False)}
    for on in (False, True):
        options = dict(windowed=on, sinks=on)
        one = with_softcap(config) if on else config
        for shared in (False, True):
            wanted = options | {"windowed": on and not shared, "capped": on, "shared": shared}
            yield made("decode", decode_constants(shape, one, target, **wanted), one.warps, one.stages)
        for few, chosen in configs.items():
            constants = extend_constants(shape, chosen, tree=on and few, capped=on, **options)
            yield made("extend", constants, chosen.warps, chosen.stages)
        if alone := prefill_config(shape, target):
            yield made("prefill", prefill_constants(shape, alone, capped=on, **options), alone.warps)
    yield made("write", write_constants(shape))
    if shape.itemsize == 2 and reads_fp8(target):
        options = dict(windowed=False, capped=False, sinks=False)
        at = config.warps, config.stages, "fp8e4nv"
        narrow = replace(shape, itemsize=1)
        halves = halved(narrow, config, target, shape.itemsize)
        over = options | {"narrow": True, "halves": halves}
        for shared in (False, True):
            yield made("decode", decode_constants(shape, config, target, shared=shared, **over), *at)
        one, wanted = with_softcap(config), dict(windowed=True, capped=True, sinks=True, narrow=True)
        yield made("decode", decode_constants(shape, one, target, **wanted), one.warps, one.stages, at[-1])
        if fetches_ahead(narrow, config, target, shape.itemsize, 1):
            constants = decode_constants(narrow, config, target, ahead=True, **over)
            yield made("decode", constants, 2 * config.warps if halves else config.warps, *at[1:])
            yield made("merge", merging_constants(narrow, config, constants["FULL"], False), 1)
        for few, chosen in configs.items():
            constants = extend_constants(shape, chosen, tree=few, **options)
            yield made("extend", constants, chosen.warps, chosen.stages, at[-1])
        yield made("write", write_constants(shape), pages=at[-1])
        if shape.key_dim == shape.value_dim:
            constants = rotate_constants(shape, True)
            yield made("rotate", constants, rotate_warps(constants), pages=at[-1])
    if shape.itemsize == 2:
        yield from products(made, target)
    yield made("draw", {"BLOCK": BLOCK}, WARPS)
    yield made("advance", {"PAGE_SIZE": shape.page_size, "BLOCK": 256})
    yield made("gate", {"BLOCK": GATE_BLOCK})
    yield made("rms_norm", norm_constants(4096), norm_warps(4096))
    if shape.key_dim == shape.value_dim:
        for norm in (False, True):
            constants = rotate_constants(shape, norm)
            yield made("rotate", constants, rotate_warps(constants))


def products(made: Callable[..., Variant], target: Target) -> Iterator[Variant]:
    """Those of a few lines: layers joined, gates, sums; of an 8B model and of a small one with a bias."""
    for lines in (1, 32, FEW_LINES):
        for inner, sizes, bias, add, gated in PRODUCTS:
            outs = sizes[0] if gated else sum(sizes)
            config = product_config(outs, inner, lines, 1 + gated, target)
            constants = product_constants(sizes, inner, lines, config, bias=bias, add=add, gated=gated)
            yield made("product", constants, config.warps, config.stages)


def _source(variant: Variant, target: str) -> ASTSource:
    kernel, constants = KERNELS[variant.kernel], dict(variant.constants)
    if "OVERLAP" in kernel.arg_names:
        constants["OVERLAP"] = overlaps(TARGETS[target])
    arguments = dict(pair.split(":") for pair in ARGUMENTS[variant.kernel].split())
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = arguments.get(name, "constexpr")
        if kind.startswith("*") or kind.endswith("/16"):
            attributes[(place,)] = [["tt.divisibility", 16]]
        signature[name] = kind.removesuffix("/16").replace("T", variant.dtype).replace("P", variant.pages)
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constexprs=constants, attrs=attributes)


def compile_for(variant: Variant, target: str) -> Compiled:
    """Compile for a card of `TARGETS`.

    Raises:
        RuntimeError, triton.TritonError: it does not compile.
    """
    card = TARGETS[target]
    cuda = card.backend == "cuda"
    gpu = GPUTarget("cuda", int(card.arch[3:]), 32) if cuda else GPUTarget("hip", card.arch, 64)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    if cuda:
        options["launch_pdl"] = overlaps(card)
    made = triton.compile(_source(variant, target), target=gpu, options=options)
    registers, spilled = _cuda_usage(made.asm["cubin"]) if cuda else _hip_usage(made.asm["amdgcn"])
    return Compiled(target, variant, made.metadata.shared, registers, spilled)


def _cuda_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers, and bytes of stack: the kernels have no arrays of their own, so what is there has spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _hip_usage(assembly: str) -> tuple[int | None, int | None]:
    """Vector registers, and bytes of scratch memory."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return (int(registers[1]) if registers else None), (int(spilled[1]) if spilled else None)


def report(chosen: Collection[HeadShape], targets: Iterable[str]) -> Iterator[Compiled]:
    """Everything that these shapes take, each variant once a card."""
    for target in targets:
        wanted = {v: None for shape in chosen for v in variants(shape, TARGETS[target])}
        for variant in wanted:
            yield compile_for(variant, target)


# What changes tiles: dims of keys and values in 2 and 4 bytes, query heads a KV head. Page sizes change an index only.
DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
SHAPES = tuple(HeadShape(4, 8, *dims, itemsize, 16) for dims in DIMS for itemsize in (2, 4))
SHAPES += (
    HeadShape(1, 8, 96, 96, 2, 1),
    HeadShape(32, 2, 128, 128, 2, 256),
    HeadShape(71, 1, 64, 64, 2, 16),
    HeadShape(71, 1, 64, 64, 4, 16),
)
SOME = SHAPES[4:6]  # the commonest dims


def main(arguments: list[str]) -> int:
    """Targets as arguments (default: all); `--some`: common shapes alone. A line of JSON a variant; 1 where one spills
    in decode or does not fit."""
    failed, some = False, "--some" in arguments
    targets = [name for name in arguments if name != "--some"] or TARGETS
    for one in report(SOME if some else SHAPES, targets):
        bad = not one.fits or (one.variant.kernel == "decode" and bool(one.spilled))
        failed |= bad
        print(json.dumps({**asdict(one), "bad": bad}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
