"""Square roots rounded to nearest, whatever the library behind `torch.sqrt` does.

On a CPU `torch.sqrt` may come from a vector library whose results are off by one unit in the last
place: MKL on an AMD EPYC with AVX-512 does that for a fifth of random float32 numbers. IEEE 754
asks for the nearest number; a GPU's `sqrt.rn`, NumPy and torch's own fused kernels give it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

SquareRoot = Callable[[Tensor], Tensor]

# 2^27 + 1 splits the 53 bits of a float64 in two halves (Dekker, Numerische Mathematik 18, 1971)
_SPLIT = 134217729.0
_UNIT = 2.0**-52


def sqrt32(x: Tensor) -> Tensor:
    """Returns the float32 square root of float32 `x`, rounded to nearest even.

    A float64 root with an error of one unit is good enough: the root of a 24-bit number is never
    closer than 2^-51, relatively, to the middle between two 24-bit numbers.

    Example:
        >>> sqrt32(torch.tensor([4.0, 2.0, -0.0])).tolist()
        [2.0, 1.4142135381698608, -0.0]
    """
    return x.double().sqrt().float()


def sqrt64(x: Tensor) -> Tensor:
    """Returns the float64 square root of float64 `x`, rounded to nearest.

    A root with an error of up to one unit is set right by its exact residual `x - root^2`.

    Args:
        x: 0, NaN, or from 2^-900 to 2^900, where no product below overflows or loses bits;
            elsewhere the root is that of `torch.sqrt`. What is no tensor may have a root of its
            own (`__torch_function__`).

    Example:
        >>> sqrt64(torch.tensor([4.0, 0.0], dtype=torch.float64)).tolist()
        [2.0, 0.0]
    """
    if has_torch_function((x,)):
        return handle_torch_function(sqrt64, (x,), x)
    root = x.sqrt()
    big = root * _SPLIT
    high = big - (big - root)
    low = root - high
    square = root * root
    rest = ((high * high - square) + 2 * (high * low)) + low * low
    residual = (x - square) - rest
    # the distance to the next number up; down from a power of two it is half as far. Half a step
    # changes the square by root * step.
    mantissa, exponent = torch.frexp(root)
    up = torch.ldexp(torch.full_like(root, _UNIT), exponent - 1)
    down = torch.where(mantissa == 0.5, up / 2, up)
    corrected = torch.where(residual > root * up, root + up, root)
    corrected = torch.where(residual <= -(root * down), root - down, corrected)
    safe = (x > 2.0**-900) & (x < 2.0**900)
    return torch.where(safe, corrected, root)
