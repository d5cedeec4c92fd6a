"""`update_scale_` of the compiled backend: one call of C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mpcore.backends._c_compiler import declared
from mpcore.loss_scale import ScaleMove
from mpcore.loss_scale import update_scale_ as plain_update_scale_

_DTYPES = (torch.float32, torch.int32, torch.int32, torch.int64)


class Move(ctypes.Structure):
    """`move_t` of `_passes.c`."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("scale", "growth_tracker", "overflows_left", "counters")),
        *((name, ctypes.c_double) for name in ("growth_factor", "backoff_factor")),
        *((name, ctypes.c_float) for name in ("min_scale", "max_scale")),
        *((name, ctypes.c_int64) for name in ("growth_interval", "few", "of_steps")),
        *((name, ctypes.c_int32) for name in ("hysteresis", "refill")),
    ]


def update_scale_(move: ScaleMove, found_inf: Tensor) -> None:
    """Moves the loss scale in place; bitwise `reference.update_scale_`, which tells the arguments.

    Tensors of another device, dtype or layout than an optimizer has are left to the reference
    backend; of a CPU none are.

    Raises:
        BackendError: The compiler refused.
    """
    if not _is_usual(move.state, found_inf):
        plain_update_scale_(move, found_inf)
        return
    numbers = Move(
        scale=move.scale.data_ptr(),
        growth_tracker=move.growth_tracker.data_ptr(),
        overflows_left=move.overflows_left.data_ptr(),
        counters=move.counters.data_ptr(),
        growth_factor=move.growth_factor,
        backoff_factor=move.backoff_factor,
        min_scale=move.min_scale,
        max_scale=move.max_scale,
        growth_interval=move.growth_interval,
        few=move.tolerance[0],
        of_steps=move.tolerance[1],
        hysteresis=move.hysteresis,
        refill=move.refill,
    )
    move_scale = declared("move_scale", None, ctypes.c_void_p, ctypes.c_int32)
    move_scale(ctypes.addressof(numbers), int(bool(found_inf)))
    # writes by address tell autograd nothing
    torch.autograd.graph.increment_version(move.state)


def _is_usual(tensors: tuple[Tensor, ...], found_inf: Tensor) -> bool:
    return (
        all(type(t) is Tensor and t.is_cpu for t in (*tensors, found_inf))
        and tuple(t.dtype for t in tensors) == _DTYPES
        and [t.numel() for t in tensors] == [1, 1, 1, 6]
        and tensors[3].is_contiguous()
    )
