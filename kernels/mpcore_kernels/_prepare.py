"""The scalars of an update: what depends on hyper-parameters and step counts alone.

    numbers  [groups]    float64, what the param groups say
    t        [tensors]   step count + 1
    scalars  [tensors, columns + 1]   rule.scalars(numbers, t), rounded to float32 once; then t

Step counts are read and not advanced: the update advances them, from the last column, if it is not
skipped. So the scalars are right after a step that overflowed, be it the first one.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mpcore_kernels import _finish
from mpcore_kernels._finish import finish_program
from mpcore_kernels._launch import Variant
from mpcore_kernels._table import CHUNK
from mpcore_kernels._tuples import joined
from mpcore_kernels.rules import RULES, Rule

# tensors per program
BLOCK = 128
WARPS = 4

_ARGUMENTS = ("*i64", "*i64", "*fp32", "i32")


@triton.jit
def _numbers(first_ptr, mask, COUNT: tl.constexpr):
    """Returns COUNT float64 numbers of each lane, whose bits lie one after the other."""
    numbers = ()
    for i in tl.static_range(COUNT):
        bits = tl.load(first_ptr + i, mask=mask, other=0)
        numbers = joined(numbers, (bits.to(tl.float64, bitcast=True),))
    return numbers


@triton.jit
def prepare_block(
    block,
    tables,
    tensors,
    SCALARS: tl.constexpr,
    NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the scalars of one block of tensors: see `_prepare_kernel`."""
    owners_ptr, numbers_ptr, scalars_ptr = tables
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < tensors
    step = tl.load(owners_ptr + lanes * 2, mask=mask, other=0)
    group = tl.load(owners_ptr + lanes * 2 + 1, mask=mask, other=0)
    step_ptr = step.to(tl.pointer_type(tl.float32))
    t = tl.load(step_ptr, mask=step != 0, other=0.0).to(tl.float64) + 1.0
    row_ptr = numbers_ptr + group * (NUMBERS + 1)
    lr = tl.load(row_ptr, mask=mask, other=0)
    own = tl.load(row_ptr + 1, mask=mask, other=0).to(tl.float64, bitcast=True)
    given = tl.load(lr.to(tl.pointer_type(tl.float32)), mask=lr != 0, other=0.0)
    lr = tl.where(lr != 0, given.to(tl.float64), own)
    scalars = SCALARS(joined((lr,), _numbers(row_ptr + 2, mask, NUMBERS - 1)), t)
    row = lanes.to(tl.int64) * (COLUMNS + 1)
    for i in tl.static_range(COLUMNS):
        tl.store(scalars_ptr + row + i, scalars[i].to(tl.float32), mask=mask)
    tl.store(scalars_ptr + row + COLUMNS, t.to(tl.float32), mask=mask)


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=["owners_ptr", "numbers_ptr", "scalars_ptr"],
)
def _prepare_kernel(
    owners_ptr,  # *i64  [tensors, 2]  in: address of the step count or 0, param group
    numbers_ptr,  # *i64  [groups, NUMBERS + 1]  in: address of a tensor that holds lr, or 0; then
    #                                                the bits of float64 numbers, lr first
    scalars_ptr,  # *f32  [tensors, COLUMNS + 1]  out
    tensors,  # i32
    SCALARS: tl.constexpr,  # rules: what computes them
    NUMBERS: tl.constexpr,  # hyper-parameters of a param group
    COLUMNS: tl.constexpr,  # scalars of a tensor, its step count not included
    BLOCK: tl.constexpr,
):
    """Writes the scalars of BLOCK tensors for their next update.

    Grid:     (ceil(tensors / BLOCK),)
    Masks:    lanes past the last tensor load zeros and store nothing.
    Numerics: float64 operations in the order in which the rule has them, each rounded to nearest
              even, contraction off; one rounding of each scalar to float32.
    Order:    programs are independent. The launch must follow the last update, whose step counts
              it reads.
    """
    prepare_block(
        tl.program_id(0),
        (owners_ptr, numbers_ptr, scalars_ptr),
        tensors,
        SCALARS=SCALARS,
        NUMBERS=NUMBERS,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
    )


@triton.jit(
    do_not_specialize=["all_chunks", "inverted", "segments", "tensors"],
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
        "owners_ptr",
        "numbers_ptr",
        "scalars_ptr",
    ],
)
def _finish_and_prepare_kernel(
    segments_ptr,  # *i64  [segments, 2]  _finish.py, up to latched_ptr
    sums_ptr,  # *i64
    facts_ptr,  # *i32
    all_chunks,  # i32
    coefficient_ptr,  # *f32
    inverted,  # i32
    max_norm,  # f32
    kinds_ptr,  # *i32
    first_bad_ptr,  # *i64
    square_sum_ptr,  # *f64
    largest_ptr,  # *f32
    found_inf_ptr,  # *i32
    grad_norm_ptr,  # *f32
    unscale_ptr,  # *f32
    latched_ptr,  # *f32
    segments,  # i32                   gradients that were inspected
    owners_ptr,  # *i64  `_prepare_kernel`, from here on
    numbers_ptr,  # *i64
    scalars_ptr,  # *f32
    tensors,  # i32
    CHUNK: tl.constexpr,
    FINISH: tl.constexpr,
    SCALARS: tl.constexpr,
    NUMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Does what `_finish_kernel` and `_prepare_kernel` do, in programs of one launch.

    Grid:     (1 + segments + ceil(tensors / BLOCK),); programs from 1 + segments on prepare.
    Masks:    those of the two kernels.
    Numerics: those of the two kernels.
    Order:    those of the two kernels: programs read nothing of each other.
    """
    program = tl.program_id(0)
    if program > segments:
        prepare_block(
            program - 1 - segments,
            (owners_ptr, numbers_ptr, scalars_ptr),
            tensors,
            SCALARS=SCALARS,
            NUMBERS=NUMBERS,
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
        )
    else:
        finish_program(
            program,
            found=(segments_ptr, sums_ptr, facts_ptr, all_chunks),
            given=(coefficient_ptr, inverted, max_norm),
            tensors=(kinds_ptr, first_bad_ptr, square_sum_ptr, largest_ptr),
            total=(found_inf_ptr, grad_norm_ptr, unscale_ptr, latched_ptr),
            CHUNK=CHUNK,
            BLOCK=FINISH,
        )


def programs(tensors: int) -> int:
    """Returns how many programs write the scalars of `tensors` tensors."""
    return -(-tensors // BLOCK)


def _constants(rule: Rule) -> tuple[tuple[str, Any], ...]:
    return (
        ("SCALARS", rule.scalars),
        ("NUMBERS", len(rule.numbers)),
        ("COLUMNS", rule.columns),
        ("BLOCK", BLOCK),
    )


def variant(rule: Rule) -> Variant:
    """Returns how the scalars of a rule are prepared in a launch of their own."""
    return Variant(
        kernel=_prepare_kernel,
        arguments=_ARGUMENTS,
        constants=_constants(rule),
        num_warps=WARPS,
        # every operation is rounded by itself, on every device
        enable_fp_fusion=False,
    )


def finishing_variant(rule: Rule) -> Variant:
    """Returns how they are prepared in the second launch of `inspect`."""
    finish = _finish.variant()
    return Variant(
        kernel=_finish_and_prepare_kernel,
        arguments=(*_finish.ARGUMENTS, "i32", *_ARGUMENTS),
        constants=(("CHUNK", CHUNK), ("FINISH", _finish.BLOCK), *_constants(rule)),
        num_warps=finish.num_warps,
        enable_fp_fusion=False,
        reductions=finish.reductions,
    )


def variants() -> list[Variant]:
    """Returns every variant that `prepare_` and `inspect` can use."""
    alone = [variant(rule) for rule in RULES.values()]
    return alone + [finishing_variant(rule) for rule in RULES.values()]
