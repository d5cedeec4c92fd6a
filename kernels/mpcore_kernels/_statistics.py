"""Counts of values by category and by exponent, in the same read of the gradients.

The counters of all tensors are one int64 buffer, a row per tensor: `CATEGORIES` columns, then
`EXPONENTS`. Programs add to a row by integer atomics. Such additions commute and cannot round, so
the counts do not depend on the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpcore_kernels._dtypes import exponent_mask, is_nonfinite, magnitude_of, widen
from mpcore_kernels._sums import magnitude_bits

#: How many categories of values are told apart: NaN, +inf, -inf, zero, subnormal, normal.
CATEGORIES = 6
#: How many exponents are told apart: those of float32, whatever the format.
EXPONENTS = 256
_CATEGORIES_IN_KERNEL = tl.constexpr(CATEGORIES)
_EXPONENTS_IN_KERNEL = tl.constexpr(EXPONENTS)


@triton.jit
def _category(bits, FORMAT: tl.constexpr):
    """Returns which column of `Inspection.counts` each value belongs to."""
    exponent: tl.constexpr = exponent_mask(FORMAT)
    magnitude = magnitude_of(bits, FORMAT)
    special = tl.where(magnitude > exponent, 0, tl.where(bits < 0, 2, 1))
    small = tl.where(magnitude == 0, 3, 4)
    finite = tl.where((bits & exponent) == 0, small, 5)
    return tl.where(is_nonfinite(bits, FORMAT), special, finite)


@triton.jit
def count_values(bits, mask, counters_ptr, GRAD: tl.constexpr):
    """Adds one chunk to its tensor's row of counters."""
    categories = tl.histogram(_category(bits, GRAD), 8, mask=mask)
    at = tl.arange(0, 8)
    here = (at < _CATEGORIES_IN_KERNEL) & (categories != 0)
    tl.atomic_add(counters_ptr + at, categories.to(tl.int64), mask=here, sem="relaxed")
    magnitude = magnitude_bits(widen(bits, GRAD))
    exponents = tl.histogram(magnitude >> 23, _EXPONENTS_IN_KERNEL, mask=mask)
    bins_ptr = counters_ptr + _CATEGORIES_IN_KERNEL + tl.arange(0, _EXPONENTS_IN_KERNEL)
    tl.atomic_add(bins_ptr, exponents.to(tl.int64), mask=exponents != 0, sem="relaxed")
