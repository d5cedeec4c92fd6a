"""The kernel of `update_`: reads a gradient once and updates all that belongs to its parameter.

Every tensor of a batch is cut into chunks; one program updates one chunk of a parameter's master,
moments and weight. Two tables on the device tell a program what its chunk is:

    owners[program]  -> row of the tensor that the chunk belongs to
    rows[tensor]     -> elements | first program | weight | step | master | moments (three)

Addresses of what is not there are 0. The gradient's address is in a table of its own, because it
changes from step to step, and the scalars come from `_prepare.py`. A launch that adopts reads the
weight as well, and does first what `adopt.py` does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpcore_kernels._counters import add_to, by_thread, count_edits
from mpcore_kernels._dtypes import FORMATS, narrow, pointer, saturate, widen
from mpcore_kernels._launch import Variant
from mpcore_kernels._table import aligned_pointer, is_aligned
from mpcore_kernels._tuples import joined, loaded
from mpcore_kernels.adopt import adopt_block, adopted_by
from mpcore_kernels.rules import RULES, Rule
from mpcore_kernels.scale import move_scale

# 8 elements a thread with 8 warps of 32, 4 with warps of 64: enough for 16-byte accesses to float32
# on both, and few enough to keep everything in registers
CHUNK = 2048
WARPS = 8
# what masked bodies take at a time: see _table.ROUND
ROUND = 512

# what moves with the loss scale: itself, tracker, hysteresis and six counters
_SCALE = (torch.float32, torch.int32, torch.int32, *(torch.int64,) * 6)

ROW = 8
_ROW = tl.constexpr(ROW)

#: dtypes of gradient and weight that a launch can combine; None: float32 parameters
COMBINATIONS: tuple[tuple[torch.dtype, torch.dtype | None], ...] = (
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, None),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
)


@triton.jit
def _at(address, start, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns a pointer to element `start` of a tensor that lies beside float32 ones."""
    if ALIGNED:
        return aligned_pointer(address, start, FORMAT, tl.float32)
    else:
        return pointer(address, FORMAT) + start


@triton.jit
def _values(masters, start, mask, other, offsets, ALIGNED: tl.constexpr):
    """Returns what the master and its moments hold, float32."""
    values = ()
    for i in tl.static_range(len(masters)):
        held_ptr = _at(masters[i], start, tl.float32, ALIGNED) + offsets
        bits = tl.load(held_ptr, mask=mask, other=other)
        values = joined(values, (widen(bits, tl.float32),))
    return values


@triton.jit
def _update_block(tensors, start, count, factors, counters, rule, formats, BLOCK: tl.constexpr):
    """Updates `count` of BLOCK elements from `start` on (None: all, at aligned addresses).

    `tensors` are the addresses of gradient and weight, and a tuple of those of the master and its
    moments; `factors` the coefficient and the scalars; the rest is as in `_update_or_adopt`.
    """
    grad, weight, masters = tensors
    coefficient, scalars = factors
    saturated_ptr, edits_ptr = counters
    APPLY: tl.constexpr = rule[0]
    ADOPT: tl.constexpr = rule[1]
    GRAD: tl.constexpr = formats[0]
    WEIGHT: tl.constexpr = formats[1]
    aligned: tl.constexpr = count is None
    offsets = tl.arange(0, BLOCK)
    mask = None if count is None else offsets < count
    other = None if count is None else 0
    bits = tl.load(_at(grad, start, GRAD, aligned) + offsets, mask=mask, other=other)
    values = _values(masters, start, mask, other, offsets, aligned)
    master = values[0]
    if ADOPT:
        written = tl.load(_at(weight, start, WEIGHT, aligned) + offsets, mask=mask, other=other)
        held, changed = adopted_by(narrow(master, tl.float32), written, WEIGHT, tl.float32)
        master = widen(held, tl.float32)
        edits = by_thread(changed, aligned)
    x = widen(bits, GRAD) * coefficient * scalars[0]
    param, moments = APPLY(x, master, values[1:], scalars)
    updated = joined((param,), moments)
    for i in tl.static_range(len(masters)):
        held_ptr = _at(masters[i], start, tl.float32, aligned) + offsets
        tl.store(held_ptr, narrow(updated[i], tl.float32), mask=mask)
    if WEIGHT is not None:
        rounded, clamped = saturate(param, WEIGHT)
        tl.store(_at(weight, start, WEIGHT, aligned) + offsets, narrow(rounded, WEIGHT), mask=mask)
        clamped = clamped if count is None else clamped & mask
        add_to(saturated_ptr, by_thread(clamped.to(tl.int32), aligned))
    if ADOPT:
        count_edits(edits_ptr, edits)


@triton.jit
def _update_chunk(tables, counters, rule, formats, sizes):
    """Updates the chunk of this program, and the step count if the chunk is a tensor's first.

    The groups are those of `_update_or_adopt`.
    """
    rows_ptr, owners_ptr, grads_ptr, scalars_ptr, coefficient_ptr = tables
    saturated_ptr, edits_ptr = counters
    MOMENTS: tl.constexpr = rule[2]
    COLUMNS: tl.constexpr = rule[3]
    GRAD: tl.constexpr = formats[0]
    WEIGHT: tl.constexpr = formats[1]
    CHUNK: tl.constexpr = sizes[0]
    ROUND: tl.constexpr = sizes[1]
    program = tl.program_id(0)
    tensor = tl.load(owners_ptr + program)
    row_ptr = rows_ptr + tensor * _ROW
    size = tl.load(row_ptr)
    start = (program - tl.load(row_ptr + 1)) * CHUNK
    weight, step = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    grad = tl.load(grads_ptr + tensor)
    masters = loaded(row_ptr + 4, 1 + MOMENTS)
    scalars_ptr += tensor * (COLUMNS + 1)
    scalars = loaded(scalars_ptr, COLUMNS)
    factors = (tl.load(coefficient_ptr), scalars)
    edits_ptr += 2 * tensor
    tensors, counters = (grad, weight, masters), (saturated_ptr, edits_ptr)
    if (step != 0) & (start == 0):
        tl.store(step.to(tl.pointer_type(tl.float32)), tl.load(scalars_ptr + COLUMNS))
    aligned = is_aligned(grad, GRAD, tl.float32) & (start + CHUNK <= size)
    for i in tl.static_range(len(masters)):
        aligned = aligned & is_aligned(masters[i], tl.float32, tl.float32)
    if WEIGHT is not None:
        aligned = aligned & is_aligned(weight, WEIGHT, tl.float32)
    if aligned:
        _update_block(tensors, start, None, factors, counters, rule, formats=formats, BLOCK=CHUNK)
    else:
        count = tl.minimum(size - start, CHUNK).to(tl.int32)
        for at in range(0, count, ROUND):
            _update_block(
                tensors,
                start + at,
                count - at,
                factors,
                counters,
                rule,
                formats=formats,
                BLOCK=ROUND,
            )


@triton.jit
def _adopt_chunk(
    rows_ptr,
    owners_ptr,
    edits_ptr,
    WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Adopts the weights of the chunk of this program: what is left of a step that is skipped."""
    program = tl.program_id(0)
    tensor = tl.load(owners_ptr + program)
    row_ptr = rows_ptr + tensor * _ROW
    start = (program - tl.load(row_ptr + 1)) * CHUNK
    count = tl.minimum(tl.load(row_ptr) - start, CHUNK).to(tl.int32)
    weight_ptr = pointer(tl.load(row_ptr + 2), WEIGHT) + start
    master_ptr = pointer(tl.load(row_ptr + 4), tl.float32) + start
    for at in range(0, count, ROUND):
        held, changed = adopt_block(
            weight_ptr + at, master_ptr + at, count - at, WEIGHT, tl.float32, ROUND
        )
        # nothing has changed past the tensor's end
        tl.store(master_ptr + at + tl.arange(0, ROUND), held, mask=changed != 0)
        count_edits(edits_ptr + 2 * tensor, changed)


@triton.jit
def _update_or_adopt(found_inf_ptr, tables, counters, rule, formats, sizes):
    """Updates the chunk of this program unless found_inf is set; then it adopts, if anything.

    The arguments of `_update_kernel` come in groups: `rule` is (APPLY, ADOPT, MOMENTS, COLUMNS),
    `formats` (GRAD, WEIGHT), `sizes` (CHUNK, ROUND).
    """
    ADOPT: tl.constexpr = rule[1]
    WEIGHT: tl.constexpr = formats[1]
    if tl.load(found_inf_ptr) == 0:
        _update_chunk(tables, counters, rule, formats, sizes)
    # behind the update: loads after a store are slower on AMD
    if ADOPT:  # noqa: SIM102 - which the compiler decides
        if tl.load(found_inf_ptr) != 0:
            _adopt_chunk(tables[0], tables[1], counters[1], WEIGHT, sizes[0], sizes[1])


@triton.jit(
    do_not_specialize=["moves", "growth_interval", "hysteresis", "refill", "few", "of_steps"],
    do_not_specialize_on_alignment=[
        "rows_ptr",
        "owners_ptr",
        "grads_ptr",
        "scalars_ptr",
        "coefficient_ptr",
        "found_inf_ptr",
        "saturated_ptr",
        "edits_ptr",
        "scale_ptr",
        "growth_tracker_ptr",
        "overflows_left_ptr",
        "counters_ptr",
    ],
)
def _update_kernel(
    rows_ptr,  # *i64  [tensors, 8]  in: above
    owners_ptr,  # *i64  [chunks]      in: above
    grads_ptr,  # *i64  [tensors]     in: addresses of the gradients
    scalars_ptr,  # *f32  [tensors, COLUMNS + 1]  in: _prepare.py
    coefficient_ptr,  # *f32  []            in
    found_inf_ptr,  # *i32  []            in
    saturated_ptr,  # *i64  []            in/out, added to
    edits_ptr,  # *i64  [tensors, 2]  in/out, added to: adopted, refused; only with ADOPT
    moves,  # i32                   not 0: the loss scale moves too
    scale_ptr,  # *f32  []  in/out, and so on: scale.py
    growth_tracker_ptr,  # *i32  []
    overflows_left_ptr,  # *i32  []
    counters_ptr,  # *i64  [6]
    growth_factor,  # f32
    backoff_factor,  # f32
    growth_interval,  # i32
    min_scale,  # f32
    max_scale,  # f32
    hysteresis,  # i32
    refill,  # i32
    few,  # i32
    of_steps,  # i32
    APPLY: tl.constexpr,  # rules: what computes an element
    GRAD: tl.constexpr,  # f16 | bf16 | f32, what the gradients hold
    WEIGHT: tl.constexpr,  # f16 | bf16 | None, what the weights hold
    MOMENTS: tl.constexpr,  # moments of each tensor, 0 to 3
    COLUMNS: tl.constexpr,  # scalars of each tensor, its step count not included
    ADOPT: tl.constexpr,  # whether weights that others wrote to become masters first
    CHUNK: tl.constexpr,
    ROUND: tl.constexpr,  # what is masked at a time
):
    """Updates one chunk unless found_inf is set; the first program also moves the loss scale.

    Grid:     (chunks,); a program owns elements [start, start + CHUNK) of one tensor, the one that
              starts at 0 its step count, and program 0 the loss scale and its counters.
    Masks:    full chunks at aligned addresses have none. The others go in rounds, in which lanes
              at or past the tensor's end load +0, store nothing and count nothing. So does a step
              that only adopts, because it is skipped, in all of its chunks.
    Numerics: load -> FP32 (exact) -> two FP32 multiplies -> the rule -> store; the weight is the
              parameter rounded to nearest even, clamped. Contraction off, divisions and roots
              rounded to nearest even.
    Order:    programs are independent: what one writes, no other one reads. Step counts are
              written from the prepared scalars and read by nobody here. The counts of clamped,
              adopted and refused values are sums of integers, so their order cannot be seen.
    """
    _update_or_adopt(
        found_inf_ptr,
        tables=(rows_ptr, owners_ptr, grads_ptr, scalars_ptr, coefficient_ptr),
        counters=(saturated_ptr, edits_ptr),
        rule=(APPLY, ADOPT, MOMENTS, COLUMNS),
        formats=(GRAD, WEIGHT),
        sizes=(CHUNK, ROUND),
    )
    if (tl.program_id(0) == 0) & (moves != 0):
        move_scale(
            found_inf_ptr,
            state=(scale_ptr, growth_tracker_ptr, overflows_left_ptr, counters_ptr),
            factors=(growth_factor, backoff_factor),
            bounds=(min_scale, max_scale),
            counts=(growth_interval, hysteresis, refill),
            tolerance=(few, of_steps),
        )


def variant(
    rule: Rule,
    moments: int,
    grad: torch.dtype,
    weight: torch.dtype | None,
    adopt: bool,
) -> Variant:
    """Returns how the kernel is launched on a batch with this many moments, of these dtypes.

    Args:
        rule: What computes an element.
        moments: How many each tensor has.
        grad: What gradients hold.
        weight: What weights hold; None: the masters are the weights.
        adopt: Whether weights that others wrote to become masters first.
    """
    held = (torch.float32,) * (1 + moments)
    weights = () if weight is None else (weight,)
    # one for each wide access, with warps of 32
    additions = CHUNK // (WARPS * 32 * 4)
    return Variant(
        kernel=_update_kernel,
        arguments=(
            *("*i64", "*i64", "*i64", "*fp32", "*fp32", "*i32", "*i64", "*i64", "i32"),
            *("*fp32", "*i32", "*i32", "*i64"),
            *("fp32", "fp32", "i32", "fp32", "fp32", "i32", "i32", "i32", "i32"),
        ),
        constants=(
            ("APPLY", rule.apply),
            ("GRAD", FORMATS[grad]),
            ("WEIGHT", None if weight is None else FORMATS[weight]),
            ("MOMENTS", moments),
            ("COLUMNS", rule.columns),
            ("ADOPT", adopt),
            ("CHUNK", CHUNK),
            ("ROUND", ROUND),
        ),
        num_warps=WARPS,
        # every operation of a rule is rounded by itself, on every device
        enable_fp_fusion=False,
        reads=(grad, *held, *(weights if adopt else ())),
        writes=(*held, *weights),
        chunk=CHUNK,
        # a tensor's first chunk writes its step count; the first program of all, the loss scale
        results=(torch.float32, *_SCALE),
        # clamped; adopted and refused
        additions=len(weights) * (3 if adopt else 1) * additions,
    )


def variants() -> list[Variant]:
    """Returns every variant that `update_` can use."""
    return [
        variant(rule, moments, grad, weight, adopt)
        for rule in RULES.values()
        for moments in rule.counts_steps
        for grad, weight in COMBINATIONS
        for adopt in ((False,) if weight is None else (False, True))
    ]
