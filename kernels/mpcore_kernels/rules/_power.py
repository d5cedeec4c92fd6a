"""A power that every device computes with the same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power(base, exponent):
    """Returns `base ** exponent`: float64 `base`, whole float64 `exponent` from 0 to 2^32 - 1.

    By repeated squaring, in this order: the result takes a square, then the square is squared.
    """
    bits = exponent.to(tl.int64)
    result = tl.full(base.shape, 1.0, tl.float64)
    # unrolled, because in the second launch of `inspect` Triton 3.7 spills around a loop
    for bit in tl.static_range(32):
        result = tl.where(((bits >> bit) & 1) != 0, result * base, result)
        base = base * base
    return result
