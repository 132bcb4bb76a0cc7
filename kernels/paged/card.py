"""Which card a device is."""

from __future__ import annotations

from functools import cache

import torch

from hf_paged.kernels.launch import Target

INTERPRETED = Target("cuda", "sm_90", 132)


@cache
def target_of(device: torch.device) -> Target:
    """The card that `device` is; on a CPU, where the interpreter runs, an H100."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Target("hip", facts.gcnArchName.split(":")[0], facts.multi_processor_count)
        return Target("cuda", f"sm_{facts.major}{facts.minor}", facts.multi_processor_count)
    if device.type == "xpu":
        return Target("xpu", "xpu", torch.xpu.get_device_properties(device).gpu_subslice_count)
    return INTERPRETED
