"""The loss scale's transition, on the device.

    counters: steps, skipped, in_a_row, at_min, since, overflows

    always:         steps += 1;  since += 1
    on overflow:    skipped += 1;  in_a_row += 1;  overflows += 1
                    tracker = 0;  left = max(left - 1, 0)
                    if left == 0 and overflows * of_steps >= since * few:
                        if scale <= min_scale:  at_min += 1
                        scale = max(scale * backoff_factor, min_scale);  since = overflows = 0
                        if refill & 2:  left = hysteresis
    on a good step: in_a_row = 0;  tracker += 1
                    if refill & 1:  left = hysteresis
                    if tracker >= growth_interval:
                        scale = min(scale * growth_factor, max_scale);  since = overflows = 0
                        tracker = 0;  left = hysteresis

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2; Kuchaiev et al.,
"Mixed-Precision Training for NLP and Speech Recognition with OpenSeq2Seq", 2018 (backoff).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcore_kernels._checks import check_device, check_state
from mpcore_kernels._launch import Variant
from mpcore_kernels._scale_move import ScaleMove, numbers_of, state_of
from mpcore_kernels._table import mark_written


@triton.jit
def move_scale(found_inf_ptr, state, factors, bounds, counts, tolerance):
    """Moves the loss scale and its counters by one step: see `_update_scale_kernel`."""
    scale_ptr, growth_tracker_ptr, overflows_left_ptr, counters_ptr = state
    growth_factor, backoff_factor = factors
    min_scale, max_scale = bounds
    growth_interval, hysteresis, refill = counts
    few, of_steps = tolerance
    bad = tl.load(found_inf_ptr) != 0
    scale = tl.load(scale_ptr)
    tracker = tl.where(bad, 0, tl.load(growth_tracker_ptr) + 1)
    left = tl.load(overflows_left_ptr)
    left = tl.where(bad, tl.maximum(left - 1, 0), tl.maximum(left, 0))
    grow = tracker >= growth_interval
    lower = tl.maximum(scale * backoff_factor, min_scale)
    higher = tl.minimum(scale * growth_factor, max_scale)
    failed = bad.to(tl.int64)
    since = tl.load(counters_ptr + 4) + 1
    overflows = tl.load(counters_ptr + 5) + failed
    many = overflows * of_steps >= since * few
    backs_off = bad & (left == 0) & many
    at_min = backs_off & (scale <= min_scale)
    kept = ((grow | backs_off) == 0).to(tl.int64)
    scale = tl.where(backs_off, lower, scale)
    full = grow | ((refill & 1 != 0) & (bad == 0)) | ((refill & 2 != 0) & backs_off)
    tl.store(scale_ptr, tl.where(grow, higher, scale))
    tl.store(growth_tracker_ptr, tl.where(grow, 0, tracker))
    tl.store(overflows_left_ptr, tl.where(full, hysteresis, left))
    tl.store(counters_ptr, tl.load(counters_ptr) + 1)
    tl.store(counters_ptr + 1, tl.load(counters_ptr + 1) + failed)
    tl.store(counters_ptr + 2, (tl.load(counters_ptr + 2) + 1) * failed)
    tl.store(counters_ptr + 3, tl.load(counters_ptr + 3) + at_min.to(tl.int64))
    tl.store(counters_ptr + 4, since * kept)
    tl.store(counters_ptr + 5, overflows * kept)


@triton.jit(
    do_not_specialize=["growth_interval", "hysteresis", "refill", "few", "of_steps"],
    do_not_specialize_on_alignment=[
        "scale_ptr",
        "growth_tracker_ptr",
        "overflows_left_ptr",
        "counters_ptr",
        "found_inf_ptr",
    ],
)
def _update_scale_kernel(
    scale_ptr,  # *f32  []  in/out
    growth_tracker_ptr,  # *i32  []  in/out
    overflows_left_ptr,  # *i32  []  in/out
    counters_ptr,  # *i64  [6]  in/out
    found_inf_ptr,  # *i32  []  in
    growth_factor,  # f32
    backoff_factor,  # f32
    growth_interval,  # i32
    min_scale,  # f32
    max_scale,  # f32
    hysteresis,  # i32
    refill,  # i32
    few,  # i32
    of_steps,  # i32
):
    """Moves the loss scale and its counters by one step.

    Grid:     (1,); one program, which works on scalars.
    Masks:    none.
    Numerics: one FP32 multiply, exact for powers of two, and a comparison with a bound. Counts
              are int64, and shares of them are compared as products of integers.
    Order:    it must follow whatever multiplies by the scale or its reciprocal in this step.
    """
    move_scale(
        found_inf_ptr,
        state=(scale_ptr, growth_tracker_ptr, overflows_left_ptr, counters_ptr),
        factors=(growth_factor, backoff_factor),
        bounds=(min_scale, max_scale),
        counts=(growth_interval, hysteresis, refill),
        tolerance=(few, of_steps),
    )


def variant() -> Variant:
    """Returns how the kernel is launched."""
    return Variant(
        kernel=_update_scale_kernel,
        arguments=(
            *("*fp32", "*i32", "*i32", "*i64", "*i32"),
            *("fp32", "fp32", "i32", "fp32", "fp32", "i32", "i32", "i32", "i32"),
        ),
        constants=(),
        num_warps=1,
        # products are compared, never added to: there is nothing to fuse
        enable_fp_fusion=False,
    )


def variants() -> list[Variant]:
    """Returns every variant that `update_scale_` can use."""
    return [variant()]


def update_scale_(move: ScaleMove, found_inf: Tensor) -> None:
    """Moves a dynamic loss scale by one step in place on its device, without a host sync.

    One launch of one program. Queue it after everything that uses this step's scale.

    Args:
        move: The rule, and the tensors that it moves: see the top of this module.
        found_inf: `[]`, int32. Not 0: the step overflowed.

    Raises:
        TypeError: If something that should be a tensor or an integer is none.
        ValueError: If a dtype, shape, device or number is not what `ScaleMove` says, or the device
            cannot run the kernels. Nothing is written then.

    Example:
        >>> from types import SimpleNamespace
        >>> tracker, left = (torch.tensor(n, dtype=torch.int32) for n in (0, 1))
        >>> move = SimpleNamespace(
        ...     scale=torch.tensor(1024.0), growth_tracker=tracker, overflows_left=left,
        ...     counters=torch.zeros(6, dtype=torch.int64), growth_factor=2.0, backoff_factor=0.5,
        ...     growth_interval=2000, min_scale=1.0, max_scale=2.0**24, hysteresis=1, refill=0,
        ...     tolerance=(0, 1))
        >>> update_scale_(move, torch.tensor(1, dtype=torch.int32))
        >>> move.scale.item(), move.counters.tolist()
        (512.0, [1, 1, 1, 0, 0, 0])
    """
    check_state("scale", move.scale, torch.float32, ())
    device = move.scale.device
    check_device(_update_scale_kernel, device)
    check_state("found_inf", found_inf, torch.int32, (), device)
    state, numbers = state_of(move, device), numbers_of(move)
    variant().launch(1, (*state, found_inf, *numbers))
    mark_written(*state)
