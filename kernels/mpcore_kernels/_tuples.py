"""Tuples whose length is known when a kernel is compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def joined(first, second):
    """Returns the values of `first`, then those of `second`."""
    return first + second


@triton.jit
def loaded(first_ptr, COUNT: tl.constexpr):
    """Returns COUNT numbers that lie one after the other."""
    values = ()
    for i in tl.static_range(COUNT):
        values = joined(values, (tl.load(first_ptr + i),))
    return values
