"""The first launch of `inspect`: what each chunk of each gradient holds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpcore_kernels._dtypes import FORMATS, is_nonfinite, pointer, widen
from mpcore_kernels._finish import load_coefficient, union
from mpcore_kernels._launch import Variant
from mpcore_kernels._statistics import CATEGORIES, EXPONENTS, count_values
from mpcore_kernels._sums import chunk_sum, is_nonfinite_magnitude, magnitude_bits
from mpcore_kernels._table import CHUNK, WARPS, aligned_pointer, is_aligned, locate

# columns of the counters of one tensor
_COUNTERS = tl.constexpr(CATEGORIES + EXPONENTS)
# beyond every place in a chunk
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _kinds_of(bits, bad, GRAD: tl.constexpr):
    """Returns the bit of `Inspection.kinds` of each value, 0 where it is not `bad`."""
    loaded = is_nonfinite(bits, GRAD)
    is_nan = widen(bits, GRAD) != widen(bits, GRAD)
    special = tl.where(is_nan, 1, tl.where(bits < 0, 4, 2))
    return tl.where(bad, tl.where(loaded, special, 8), 0)


@triton.jit
def _examine(grad_ptr, count, coefficient, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Returns kinds, first bad place and largest of the first `count` elements, BLOCK at a time.

    Reads again what `_inspect_block` read: only chunks that are not finite come here, and to look
    at them from its registers would cost those of all others.
    """
    kinds = tl.zeros((BLOCK,), tl.int32)
    first = tl.full((BLOCK,), _NOWHERE, tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(grad_ptr + at, mask=at < count, other=0)
        magnitude = magnitude_bits(widen(bits, GRAD) * coefficient)
        # zero times a coefficient that is not finite is a NaN: lanes past the end must not see it
        bad = is_nonfinite_magnitude(magnitude) & (at < count)
        kinds |= _kinds_of(bits, bad, GRAD)
        first = tl.minimum(first, tl.where(bad, at, _NOWHERE))
        largest = tl.maximum(largest, tl.where(is_nonfinite_magnitude(magnitude), 0, magnitude))
    return union(kinds), tl.min(first, axis=0), tl.max(largest, axis=0)


@triton.jit
def _inspect_block(
    grad_ptr,
    count,
    coefficient,
    counters_ptr,
    GRAD: tl.constexpr,
    STATISTICS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Returns sum and largest of the first `count` elements (None: all)."""
    offsets = tl.arange(0, CHUNK)
    mask = None if count is None else offsets < count
    bits = tl.load(grad_ptr + offsets, mask=mask, other=None if count is None else 0)
    unscaled = widen(bits, GRAD) * coefficient
    largest = tl.max(magnitude_bits(unscaled), axis=0)
    if STATISTICS:
        count_values(bits, mask, counters_ptr, GRAD)
    return chunk_sum(unscaled, largest, CHUNK), largest


@triton.jit(
    do_not_specialize=["inverted", "chunks", "base"],
    do_not_specialize_on_alignment=[
        "entries_ptr",
        "owners_ptr",
        "coefficient_ptr",
        "sums_ptr",
        "facts_ptr",
        "counters_ptr",
    ],
)
def _inspect_kernel(
    entries_ptr,  # *i64  [tensors, 5]  in: _table.py; destinations are not looked at
    owners_ptr,  # *i64  [programs]    in: _table.py
    coefficient_ptr,  # *f32  []            in
    inverted,  # i32                   not 0: what unscales is the reciprocal of that
    sums_ptr,  # *i64  [chunks]      out: _sums.chunk_sum
    facts_ptr,  # *i32  [3, chunks]   out: largest magnitude (bits), kinds, first bad place
    chunks,  # i32                   chunks of all dtypes
    base,  # i32                   chunks of the dtypes before this one
    counters_ptr,  # *i64  [grads, 262]  in/out, added to; not touched without STATISTICS
    GRAD: tl.constexpr,  # f16 | bf16 | f32, what the table's sources hold
    STATISTICS: tl.constexpr,  # whether to count
    CHUNK: tl.constexpr,
):
    """Writes what one chunk holds, unscaled, to its own place in the buffer.

    Grid:     (chunks of this dtype,); a program owns elements [start, start + CHUNK) of one tensor.
    Masks:    full chunks at aligned addresses have none. In the others, lanes at or past the
              tensor's end load +0: no part of a sum and never the largest, unless the coefficient
              is not finite; then every element is bad. Kinds, places and counts leave them out.
    Numerics: a reciprocal is rounded to nearest even.
              load -> FP32 (exact) -> one FP32 multiply, as `unscale_into` stores it -> `_sums.py`.
              A chunk that is not finite is read again to tell why; its sum is not used.
    Order:    programs are independent and write to places of their own. Inside a program: maxima,
              minima, unions, and `_sums.py`. Statistics: integer atomics, which commute.
    """
    grad, _, start, size, index = locate(entries_ptr, owners_ptr, CHUNK)
    coefficient = load_coefficient(coefficient_ptr, inverted)
    counters_ptr += index * _COUNTERS
    count = tl.minimum(size - start, CHUNK).to(tl.int32)
    if is_aligned(grad, GRAD, GRAD) & (count == CHUNK):
        grad_ptr = aligned_pointer(grad, start, GRAD, GRAD)
        total, largest = _inspect_block(
            grad_ptr, None, coefficient, counters_ptr, GRAD, STATISTICS, CHUNK=CHUNK
        )
    else:
        grad_ptr = pointer(grad, GRAD) + start
        total, largest = _inspect_block(
            grad_ptr, count, coefficient, counters_ptr, GRAD, STATISTICS, CHUNK=CHUNK
        )
    kinds = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    if is_nonfinite_magnitude(largest):
        grad_ptr = pointer(grad, GRAD) + start
        kinds, first, largest = _examine(grad_ptr, count, coefficient, GRAD, 512)
        # integers made of infinities and NaNs differ between devices
        total = tl.zeros_like(total)
    chunk = base.to(tl.int64) + tl.program_id(0)
    tl.store(sums_ptr + chunk, total)
    tl.store(facts_ptr + chunk, largest)
    tl.store(facts_ptr + chunks + chunk, kinds)
    tl.store(facts_ptr + 2 * chunks.to(tl.int64) + chunk, first)


def variant(dtype: torch.dtype, statistics: bool) -> Variant:
    """Returns how the chunks of gradients of one dtype are inspected."""
    return Variant(
        kernel=_inspect_kernel,
        arguments=("*i64", "*i64", "*fp32", "i32", "*i64", "*i32", "i32", "i32", "*i64"),
        constants=(("GRAD", FORMATS[dtype]), ("STATISTICS", statistics), ("CHUNK", CHUNK)),
        num_warps=WARPS,
        # squares are rounded before they are added, on every device
        enable_fp_fusion=False,
        reads=(dtype,),
        chunk=CHUNK,
        results=(torch.int64, torch.int32, torch.int32, torch.int32),
        counters=(CATEGORIES, EXPONENTS) if statistics else (),
        # maximum and sum; two histograms are made of several each. A chunk that is not finite
        # needs more, off the path that the audit judges.
        reductions=5 if statistics else 2,
    )
