"""Float32 numbers rounded to bfloat16 at random, so that what they lose is 0 on average.

    P(away from zero) = the 16 bits that are dropped / 65536

A number whose neighbours are d apart moves on average by what it should, however small that is next
to d: an average that decays by a thousandth a step would stand still if it were rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE, _INFINITY, _LARGEST = 0x7FFFFFFF, 0x7F800000, 0x7F7F0000


@torch.no_grad()
def round_randomly(value: Tensor, bits: Tensor) -> Tensor:
    """Returns float32 numbers as bfloat16, rounded stochastically; no host sync.

    A number that is a bfloat16 number stays it. Finite numbers beyond the largest one become it,
    so that no rounding makes an infinity; infinities stay, and a NaN stays one.

    Args:
        value: float32, any shape.
        bits: Random integers from 0 to 65535, its shape: see `random_bits`.

    Example:
        >>> third = torch.tensor([1 / 3])
        >>> [round_randomly(third, torch.tensor([r])).item() for r in (0, 65535)]
        [0.33203125, 0.333984375]
    """
    held = value.view(torch.int32)
    magnitude, sign = held & _MAGNITUDE, held & ~_MAGNITUDE
    finite = magnitude < _INFINITY
    # 0x7F7F0000 + 0xFFFF still has the upper half of the largest
    upper = (magnitude.clamp(max=_LARGEST) + bits.to(torch.int32)) >> 16
    quiet = (magnitude > _INFINITY).to(torch.int32) * 0x40
    upper = torch.where(finite, upper, (magnitude >> 16) | quiet)
    return ((sign >> 16) | upper).to(torch.int16).view(torch.bfloat16)


@torch.no_grad()
def round_to_nearest(value: Tensor) -> Tensor:
    """Returns float32 numbers as bfloat16, ties to even, clamped as above; no host sync.

    Example:
        >>> round_to_nearest(torch.tensor([1 / 3, 3.4e38])).tolist()
        [0.333984375, 3.3895313892515355e+38]
    """
    largest = torch.finfo(torch.bfloat16).max
    finite = value.clamp(-largest, largest).to(torch.bfloat16)
    return torch.where(value.isfinite(), finite, value.to(torch.bfloat16))
