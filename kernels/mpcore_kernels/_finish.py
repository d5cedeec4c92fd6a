"""The second launch of `inspect`: from what was found in each chunk to tensors and the total."""

from __future__ import annotations

import triton
import triton.language as tl

from mpcore_kernels._launch import Variant
from mpcore_kernels._sums import align, as_float64, exponent_of
from mpcore_kernels._table import CHUNK

# a program reads BLOCK chunks at a time: a billion elements in 60 rounds
BLOCK = 4096
WARPS = 16
# larger than every place in a tensor
_NOWHERE = tl.constexpr(2**62)


@triton.jit
def union(kinds):
    """Returns the union of int32 bit sets of four bits."""
    union = tl.max(kinds & 1, axis=0) | tl.max(kinds & 2, axis=0)
    return union | tl.max(kinds & 4, axis=0) | tl.max(kinds & 8, axis=0)


@triton.jit
def load_coefficient(coefficient_ptr, inverted):
    """Returns what unscales: the number that is there, or the nearest one to its reciprocal."""
    given = tl.load(coefficient_ptr)
    return tl.where(inverted != 0, tl.div_rn(1.0, given), given)


@triton.jit
def _square_sum(sums_ptr, largest_ptr, chunks, largest, BLOCK: tl.constexpr):
    """Returns the float64 sum of the squares of `chunks` chunks, none above `largest`."""
    exponent = exponent_of(largest)
    lanes = tl.arange(0, BLOCK)
    high = tl.zeros((BLOCK,), tl.int64)
    low = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, chunks, BLOCK):
        at = start + lanes
        sums = tl.load(sums_ptr + at, mask=at < chunks, other=0)
        largest_here = tl.load(largest_ptr + at, mask=at < chunks, other=0)
        more_high, more_low = align(sums, largest_here, exponent)
        high += more_high
        low += more_low
    return as_float64(tl.sum(high, axis=0), tl.sum(low, axis=0), exponent)


@triton.jit
def _gather(facts_ptr, all_chunks, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the largest magnitude (bits), the union of kinds and the first bad place."""
    lanes = tl.arange(0, BLOCK)
    largest_lanes = tl.zeros((BLOCK,), tl.int32)
    kinds_lanes = tl.zeros((BLOCK,), tl.int32)
    first_lanes = tl.full((BLOCK,), _NOWHERE, tl.int64)
    for start in range(0, chunks, BLOCK):
        at = start + lanes
        mask = at < chunks
        largest_lanes = tl.maximum(largest_lanes, tl.load(facts_ptr + at, mask=mask, other=0))
        kinds = tl.load(facts_ptr + all_chunks + at, mask=mask, other=0)
        kinds_lanes |= kinds
        bad = tl.load(facts_ptr + 2 * all_chunks.to(tl.int64) + at, mask=kinds != 0, other=0)
        place = at.to(tl.int64) * CHUNK + bad
        first_lanes = tl.minimum(first_lanes, tl.where(kinds != 0, place, _NOWHERE))
    return tl.max(largest_lanes, axis=0), union(kinds_lanes), tl.min(first_lanes, axis=0)


@triton.jit
def _latch(square_sum, kinds, coefficient, max_norm):
    """Returns the norm and the coefficient that also clips to it, both float32."""
    norm = tl.sqrt(square_sum)
    # a literal would be rounded to float32 on its way
    epsilon = tl.full((), 1e-6, tl.float64)
    one = tl.full((), 1.0, tl.float64)
    # the interpreter passes a Python float
    limit = tl.full((), max_norm, tl.float32).to(tl.float64)
    clip = tl.minimum(limit / (norm + epsilon), one)
    # a norm that is not finite must not make all gradients so
    clip = tl.where(kinds == 0, clip, one)
    return norm.to(tl.float32), (coefficient.to(tl.float64) * clip).to(tl.float32)


@triton.jit
def finish_program(program, found, given, tensors, total, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Does what a program of `_finish_kernel` does, whose arguments come in groups."""
    segments_ptr, sums_ptr, facts_ptr, all_chunks = found
    coefficient_ptr, inverted, max_norm = given
    kinds_ptr, first_bad_ptr, square_sum_ptr, largest_ptr = tensors
    found_inf_ptr, grad_norm_ptr, unscale_ptr, latched_ptr = total
    begin = 0
    chunks = all_chunks
    if program > 0:
        begin = tl.load(segments_ptr + (program - 1) * 2).to(tl.int32)
        chunks = tl.load(segments_ptr + (program - 1) * 2 + 1).to(tl.int32)
    sums_ptr += begin
    facts_ptr += begin
    largest, kinds, first = _gather(facts_ptr, all_chunks, chunks, CHUNK, BLOCK)
    square_sum = _square_sum(sums_ptr, facts_ptr, chunks, largest, BLOCK)
    square_sum = tl.where(kinds == 0, square_sum, float("inf"))
    square_sum = tl.where((kinds & 1) == 0, square_sum, float("nan"))
    if program == 0:
        coefficient = load_coefficient(coefficient_ptr, inverted)
        norm, latched = _latch(square_sum, kinds, coefficient, max_norm)
        tl.store(found_inf_ptr, (kinds != 0).to(tl.int32))
        tl.store(grad_norm_ptr, norm)
        tl.store(unscale_ptr, coefficient)
        tl.store(latched_ptr, latched)
    else:
        tl.store(kinds_ptr + program - 1, kinds)
        tl.store(first_bad_ptr + program - 1, tl.where(kinds != 0, first, -1))
        tl.store(square_sum_ptr + program - 1, square_sum)
        tl.store(largest_ptr + program - 1, largest.to(tl.float32, bitcast=True))


@triton.jit(
    do_not_specialize_on_alignment=[
        "segments_ptr",
        "sums_ptr",
        "facts_ptr",
        "coefficient_ptr",
        "kinds_ptr",
        "first_bad_ptr",
        "square_sum_ptr",
        "largest_ptr",
        "found_inf_ptr",
        "grad_norm_ptr",
        "unscale_ptr",
        "latched_ptr",
    ],
    do_not_specialize=["all_chunks", "inverted"],
)
def _finish_kernel(
    segments_ptr,  # *i64  [tensors, 2]  in: first chunk and number of chunks of each tensor
    sums_ptr,  # *i64  [chunks]      in: _sums.chunk_sum
    facts_ptr,  # *i32  [3, chunks]   in: largest magnitude (bits), kinds, first bad place
    all_chunks,  # i32                   number of chunks
    coefficient_ptr,  # *f32  []            in
    inverted,  # i32                   not 0: what unscales is the reciprocal of that
    max_norm,  # f32, infinity for none
    kinds_ptr,  # *i32  [tensors]     out
    first_bad_ptr,  # *i64  [tensors]     out
    square_sum_ptr,  # *f64  [tensors]     out
    largest_ptr,  # *f32  [tensors]     out
    found_inf_ptr,  # *i32  []            out
    grad_norm_ptr,  # *f32  []            out
    unscale_ptr,  # *f32  []            out: what unscales
    latched_ptr,  # *f32  []            out: times the clip
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts the chunks of one tensor together, or, in program 0, those of all tensors.

    Grid:     (1 + tensors,); program 0 writes the total, program 1 + i what tensor i has.
    Masks:    BLOCK chunks a round; lanes past the last chunk load 0, which adds nothing.
    Numerics: a reciprocal is rounded to nearest even. Integers until `as_float64`. Then one float64
              each of multiply, add, square root and division, all IEEE, contraction off, and one
              rounding of each result to float32.
    Order:    programs read what the launch before wrote and nothing of each other. Maxima, unions
              and sums are over integers, so no order can be seen.
    """
    finish_program(
        tl.program_id(0),
        found=(segments_ptr, sums_ptr, facts_ptr, all_chunks),
        given=(coefficient_ptr, inverted, max_norm),
        tensors=(kinds_ptr, first_bad_ptr, square_sum_ptr, largest_ptr),
        total=(found_inf_ptr, grad_norm_ptr, unscale_ptr, latched_ptr),
        CHUNK=CHUNK,
        BLOCK=BLOCK,
    )


# types of the arguments that are no constants
ARGUMENTS = (
    *("*i64", "*i64", "*i32", "i32", "*fp32", "i32", "fp32"),
    *("*i32", "*i64", "*fp64", "*fp32", "*i32", "*fp32", "*fp32", "*fp32"),
)


def variant() -> Variant:
    """Returns how the kernel is launched."""
    return Variant(
        kernel=_finish_kernel,
        arguments=ARGUMENTS,
        constants=(("CHUNK", CHUNK), ("BLOCK", BLOCK)),
        num_warps=WARPS,
        # the multiplication in `as_float64` is by a power of two, so nothing could change; off,
        # because the reference has no such instruction
        enable_fp_fusion=False,
        # maximum, four kinds, two sums, a place
        reductions=8,
    )
