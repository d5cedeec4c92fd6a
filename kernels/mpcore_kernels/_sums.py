"""Sums of squares that come out the same in any order, because what is added are integers.

Floating-point sums depend on the order of their terms, and the order inside a reduction is the
compiler's. Here only groups of four neighbours are added as floats, in an order that is written
down; everything beyond is a sum of integers, which every order gives the same bits.

A chunk of float32 values `x`, whose largest magnitude has the exponent `e`:

    scaled = x * 2^-e                                       exact; the largest is in [1, 2)
    four   = (s0 + s1) + (s2 + s3),  s = scaled * scaled    float32, rounded to nearest even
    sum    = integer sum of trunc(four * 2^46)              int64, exact
    sum of the squares of x  =  sum * 2^(2 e - 46)

`e` is clamped to [-126, 126], so that both 2^e and 2^-e are normal numbers. Then `scaled` is below
4 and a chunk's `sum` at most 2^62: no square of a finite number overflows, and none that matters
vanishes.

Chunks are added as integers too: shifted right to the largest exponent among them and split into
two halves of 31 and 32 bits, so that 2^31 chunks fit. The result is a float64.

Error: a square and two additions round, 2^-24 each; truncation takes less than 1024 units of 2^-46
in a chunk and one from each chunk, against a sum of at least 2^46 units. Relative to the exact sum:
below 3 * 2^-24 + 2^-36 + chunks * 2^-46; a norm's error is half of that.

Idea: summation in fixed point after a common exponent, as in Demmel and Nguyen, "Parallel
Reproducible Summation", IEEE Transactions on Computers 64(7), 2015.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x):
    """Returns the bits of |x|: they compare like the magnitudes, NaNs above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def is_nonfinite_magnitude(bits):
    """Tells for `magnitude_bits` where they encode an infinity or a NaN."""
    return bits >= _INFINITY


@triton.jit
def exponent_of(bits):
    """Returns the exponent of the magnitudes that are at most the finite float32 of these bits."""
    return tl.minimum(tl.maximum((bits >> 23) - 127, -126), 126)


@triton.jit
def _add_neighbours(x, SIZE: tl.constexpr):
    """Returns x[0] + x[1], x[2] + x[3] and so on: a sum per pair, in no order but this one."""
    even, odd = tl.split(tl.reshape(x, (SIZE // 2, 2)))
    return even + odd


@triton.jit
def chunk_sum(x, largest, SIZE: tl.constexpr):
    """Returns the int64 sum of a chunk's squares, in units of 2^(2 * exponent_of(largest) - 46).

    `x` holds SIZE finite float32 values and `largest` the bits of the largest magnitude.
    """
    power = ((127 - exponent_of(largest)) << 23).to(tl.float32, bitcast=True)
    scaled = x * power
    pairs = _add_neighbours(scaled * scaled, SIZE)
    fours = _add_neighbours(pairs, SIZE // 2)
    return tl.sum((fours * 70368744177664.0).to(tl.int64), axis=0)  # 2^46


@triton.jit
def align(sums, largest, exponent):
    """Returns the halves of chunk sums in units of 2^(2 * exponent - 46), high one first.

    The high one counts 2^32 units. `exponent` is at least that of each chunk's `largest`.
    """
    shift = tl.minimum(2 * (exponent - exponent_of(largest)), 63)
    aligned = sums >> shift.to(tl.int64)
    return aligned >> 32, aligned & 0xFFFFFFFF


@triton.jit
def as_float64(high, low, exponent):
    """Returns `(high * 2^32 + low) * 2^(2 * exponent - 46)`, rounded once, as float64."""
    units = high.to(tl.float64) * 4294967296.0 + low.to(tl.float64)
    power = ((2 * exponent - 46 + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return units * power
