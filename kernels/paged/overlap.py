"""Kernels that begin before the one ahead of them has ended: programmatic dependent launch, from Hopper on.

Such a kernel lets the next one start when all of its own programs are nearly done, and looks at nothing before all
kernels ahead have ended. A step has some three hundred kernels, each with a start and an end at which the memory stands
idle. (To start them earlier, or to fetch weights ahead, costs more than it gains: programs that wait hold what others
need.) `decode` alone does both: it looks early at what the kernel right ahead, which stores new keys and values, leaves
as it is, and lets the next one start as soon as that kernel has ended. `merge.py`, which only comes right behind a
`decode`, lets the next one start at once: when that looks early, all that came before the `decode` has ended.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from hf_paged.kernels.card import target_of
from hf_paged.kernels.launch import overlaps


@triton.jit
def _control(WHAT: tl.constexpr):
    """As `tl.extra.cuda.gdc_…`, which later versions of Triton do not let stand in a loop whose loads run ahead."""
    asm: tl.constexpr = "griddepcontrol." + WHAT + "; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def await_others(OVERLAP: tl.constexpr):
    """Returns when all kernels ahead have ended: first in a kernel, in every program."""
    if OVERLAP:
        _control("wait")


@triton.jit
def admit_next(OVERLAP: tl.constexpr):
    """The next kernel may start, once all programs have come this far or have ended."""
    if OVERLAP:
        _control("launch_dependents")


@cache
def overlap(device: torch.device) -> dict:
    """How a kernel is launched there: its constant, and the option that goes with it."""
    if device.type != "cuda" or not overlaps(target_of(device)):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
