"""`update_scale_` of the compiled backend: one call of C."""

from __future__ import annotations

import ctypes
from functools import lru_cache

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

    def point_to(self, move: ScaleMove) -> None:
        """Takes the addresses of the tensors as they are now."""
        self.scale = move.scale.data_ptr()
        self.growth_tracker = move.growth_tracker.data_ptr()
        self.overflows_left = move.overflows_left.data_ptr()
        self.counters = move.counters.data_ptr()


def update_scale_(move: ScaleMove, found_inf: Tensor) -> None:
    """Moves the loss scale in place; bitwise `reference.update_scale_`, which tells the arguments.

    Tensors of another device, dtype or layout than an optimizer has are left to the reference
    backend; of a CPU none are.

    Raises:
        BackendError: The compiler refused.
    """
    numbers = _numbers_of(move)
    if numbers is None or type(found_inf) is not Tensor or not found_inf.is_cpu:
        plain_update_scale_(move, found_inf)
        return
    numbers.point_to(move)
    move_scale = declared("move_scale", None, ctypes.c_void_p, ctypes.c_int32)
    move_scale(ctypes.addressof(numbers), bool(found_inf))
    # writes by address tell autograd nothing
    torch.autograd.graph.increment_version(move.state)


@lru_cache(maxsize=16)  # an optimizer has one for all its steps
def _numbers_of(move: ScaleMove) -> Move | None:
    """Returns what C is told, but for addresses; None if the tensors are not an optimizer's."""
    state = move.state
    usual = (
        all(type(tensor) is Tensor and tensor.is_cpu for tensor in state)
        and tuple(tensor.dtype for tensor in state) == _DTYPES
        and [tensor.numel() for tensor in state] == [1, 1, 1, 6]
        and state[3].is_contiguous()
    )
    if not usual:
        return None
    return Move(
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
