"""KV in 8 bits: e4m3, one of the two of Micikevicius et al., "FP8 Formats for Deep Learning", 2022.

A sign, 4 bits of exponent and 3 of fraction: numbers up to 448 are off by 1/16 of themselves at most, those under 2^-6
by 2^-10. There are no scales: keys and values of usual models lie well inside, and a number is stored alike whatever
else there is. Reading widens it again, and sums are float32.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as pages of `dtype` hold it. In fp8 what is too large becomes the largest number there is; NaN stays."""
    return x.clamp(-LARGEST, LARGEST).to(FP8) if dtype == FP8 else x


def raw(x: torch.Tensor) -> torch.Tensor:
    """The same memory for torch's index ops, which know no fp8."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def selected(pages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`pages.index_select(0, index)`."""
    return raw(pages).index_select(0, index).view(pages.dtype)


def all_finite(x: torch.Tensor) -> bool:
    """Whether all numbers are finite."""
    return bool(((raw(x) & 0x7F) != 0x7F).all() if x.dtype == FP8 else x.isfinite().all())
