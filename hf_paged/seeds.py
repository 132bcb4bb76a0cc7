"""Seeds: one from torch's generator, many from one."""

from __future__ import annotations

import torch

MASK = (1 << 64) - 1


def mix_seed(seed: int, index: int) -> int:
    """A seed for item `index` of what `seed` governs (splitmix64's finaliser; Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw_seed() -> int:
    """A seed from torch's global generator, which advances by one draw."""
    return int(torch.randint(0, 2**63 - 1, (1,)).item())
