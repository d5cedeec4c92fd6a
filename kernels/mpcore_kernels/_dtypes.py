"""Exact conversions between FP32 and the 16-bit formats, for kernels that move bits.

Kernels load and store integers (`int16` for FP16 and BF16, `int32` for FP32) and convert in
registers with the helpers below. One arithmetic then holds on every device:

- BF16 is converted with integer instructions. Triton's interpreter truncates where a BF16 cast
  should round and flushes BF16 subnormals on load, so the native cast has no common oracle.
- FP16 uses the native conversions, which round to nearest even, keep subnormals and overflow to
  infinity on NVIDIA, on AMD and in the interpreter.
- FP32 passes through untouched.

A NaN stays a NaN; its payload is not kept.

Source: IEEE 754-2019, section 4.3.1 (roundTiesToEven) and 3.4 (encodings).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# the name under which a kernel knows the elements of a tensor
FORMATS: dict[torch.dtype, tl.dtype] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.constexpr_function
def access_bytes(format: tl.dtype, other: tl.dtype) -> int:
    """Returns how many bytes of `format` one access moves in a kernel that also moves `other`.

    The wider format takes 16 bytes, the widest access there is, and the narrower one the same
    number of *elements*: 8 bytes of FP16 beside 16 of FP32. With 16 bytes of both, the threads
    would have to exchange elements through shared memory.
    """
    bits, other_bits = int(format.primitive_bitwidth), int(other.primitive_bitwidth)
    return 16 * bits // max(bits, other_bits)


@triton.jit
def pointer(address, FORMAT: tl.constexpr):
    """Turns an int64 address into a pointer to the bits of FORMAT."""
    if FORMAT.is_fp32():
        return address.to(tl.pointer_type(tl.int32))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def widen(bits, FORMAT: tl.constexpr):
    """Returns the float32 that the bits of FORMAT stand for; exact, subnormals included."""
    if FORMAT.is_fp16():
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT.is_bf16():
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, FORMAT: tl.constexpr):
    """Returns the bits of float32 `x` rounded to nearest even; past the largest value: infinity."""
    if FORMAT.is_fp16():
        return x.to(tl.float16).to(tl.int16, bitcast=True)
    elif FORMAT.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        # half of the last place that stays, less one where that place is even: ties go to even
        rounded = bits + (0x7FFF + ((bits >> 16) & 1))
        # a NaN must not round: a carry could make it -0 or an infinity, so it is quieted instead
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return (tl.where(is_nan, bits | 0x00400000, rounded) >> 16).to(tl.int16)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def narrow_product(x, FORMAT: tl.constexpr):
    """Returns what `narrow` does, for an `x` that is the result of a multiplication.

    For AMD, Triton 3.7 and 3.8 make one instruction of a multiplication and a rounding to FP16: a
    fused multiply-add whose addend is +0. The sum of -0 and +0 is +0, so a product of -0 would lose
    its sign. Here the sign does not pass through the rounding: it is taken from `x` and put back.
    """
    if FORMAT.is_fp16():
        sign = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16) & -0x8000
        return narrow(tl.abs(x), FORMAT) | sign
    else:
        return narrow(x, FORMAT)


@triton.jit
def saturate(x, FORMAT: tl.constexpr):
    """Returns `x` with finite values that FORMAT would round to infinity clamped, and which.

    The bound is half a place above the largest finite value: there and beyond, rounding to nearest
    even would give infinity (65520 for FP16). Infinities and NaNs pass.
    """
    # 65520 and 65504 for FP16, 2**128 - 2**119 and 2**128 - 2**120 for BF16, as bits of FP32:
    # magnitudes of floats compare like their bits
    bound: tl.constexpr = 0x477FF000 if FORMAT.is_fp16() else 0x7F7F8000
    largest: tl.constexpr = 0x477FE000 if FORMAT.is_fp16() else 0x7F7F0000
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    clamped = (magnitude >= bound) & (magnitude < 0x7F800000)
    sign = bits ^ magnitude
    return tl.where(clamped, sign | largest, bits).to(tl.float32, bitcast=True), clamped


@triton.jit
def magnitude_of(bits, FORMAT: tl.constexpr):
    """Returns the bits of FORMAT without their sign, as int32.

    They compare like the magnitudes do, with infinity above all numbers and NaNs above infinity.
    """
    unsigned: tl.constexpr = 0x7FFFFFFF if FORMAT.is_fp32() else 0x7FFF
    return (bits & unsigned).to(tl.int32)


@triton.constexpr_function
def exponent_mask(format: tl.dtype) -> int:
    """Returns the exponent's bits: all set in infinities and NaNs, in nothing else."""
    return int((1 << (format.primitive_bitwidth - 1)) - (1 << format.fp_mantissa_width))


@triton.jit
def is_nonfinite(bits, FORMAT: tl.constexpr):
    """Tells for the bits of FORMAT where they encode an infinity or a NaN."""
    exponent: tl.constexpr = exponent_mask(FORMAT)
    return (bits & exponent) == exponent
