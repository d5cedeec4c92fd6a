"""What moves a dynamic loss scale, and what the kernels demand of it."""

from __future__ import annotations

import ctypes
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from mpcore_kernels._checks import check_state

_LARGEST_INT32 = 2**31 - 1
_FINEST = 10**6  # with it 2^43 steps can be compared in int64


class ScaleMove(Protocol):
    """A dynamic loss scale's rule and its state on one device: an object with these attributes."""

    @property
    def scale(self) -> Tensor:
        """`[]`, float32. Changed, like the three that follow."""

    @property
    def growth_tracker(self) -> Tensor:
        """`[]`, int32. Good steps since the scale moved or a step overflowed."""

    @property
    def overflows_left(self) -> Tensor:
        """`[]`, int32. Overflows from which on the scale backs off; at least 0."""

    @property
    def counters(self) -> Tensor:
        """`[6]`, int64, contiguous: see the top of `mpcore_kernels.scale`. Changed."""

    @property
    def growth_factor(self) -> float:
        """Above 1, a float32 number. A power of two keeps the scale one."""

    @property
    def backoff_factor(self) -> float:
        """Above 0, below 1, a float32 number."""

    @property
    def growth_interval(self) -> int:
        """Good steps in a row before the scale grows, from 1 to 2^31 - 1."""

    @property
    def min_scale(self) -> float:
        """Floor, above 0."""

    @property
    def max_scale(self) -> float:
        """Ceiling, above 0 and finite."""

    @property
    def hysteresis(self) -> int:
        """What `overflows_left` becomes when the scale grows, from 1 to 2^31 - 1."""

    @property
    def refill(self) -> int:
        """0 to 3, a sum of what else makes it that: 1 for a good step, 2 for backing off."""

    @property
    def tolerance(self) -> tuple[int, int]:
        """(few, of_steps), 0 <= few < of_steps <= 10^6: the share from which on it backs off."""


def state_of(move: ScaleMove, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the tensors; raises unless they are as `ScaleMove` says, and on `device`."""
    check_state("scale", move.scale, torch.float32, (), device)
    check_state("growth_tracker", move.growth_tracker, torch.int32, (), device)
    check_state("overflows_left", move.overflows_left, torch.int32, (), device)
    check_state("counters", move.counters, torch.int64, (6,), device)
    return move.scale, move.growth_tracker, move.overflows_left, move.counters


def numbers_of(move: ScaleMove) -> tuple[Any, ...]:
    """Returns the nine numbers a kernel takes; raises unless they are as `ScaleMove` says."""
    return (
        _check_factor("growth_factor", move.growth_factor, 1.0, math.inf),
        _check_factor("backoff_factor", move.backoff_factor, 0.0, 1.0),
        _check_count("growth_interval", move.growth_interval),
        _check_between("min_scale", move.min_scale, 0.0, math.inf),
        _check_between("max_scale", move.max_scale, 0.0, math.inf),
        _check_count("hysteresis", move.hysteresis),
        _check_refill(move.refill),
        *_check_tolerance(move.tolerance),
    )


def _check_factor(name: str, value: float, lowest: float, highest: float) -> float:
    """Returns `value` as a float; raises unless it is a float32 number between the bounds."""
    value = _check_between(name, value, lowest, highest)
    # a launch would round it, and the scale would differ from the reference's in the last place
    if ctypes.c_float(value).value != value:
        raise ValueError(
            f"{name}: expected a float32 number, got {value!r}, which is none. Round it, or use "
            "the reference backend, which multiplies in float64."
        )
    return value


def _check_between(name: str, value: float, lowest: float, highest: float) -> float:
    """Returns `value` as a float; raises unless it is strictly between the bounds."""
    if not lowest < value < highest:
        raise ValueError(
            f"{name}: expected a number above {lowest:g} and below {highest:g}, got {value!r}."
        )
    return float(value)


def _check_count(name: str, value: int) -> int:
    """Returns `value`; raises unless it is an integer from 1 to 2^31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}.")
    if not 1 <= value <= _LARGEST_INT32:
        raise ValueError(f"{name}: expected an integer from 1 to 2**31 - 1, got {value}.")
    return value


def _check_refill(value: int) -> int:
    """Returns `value`; raises unless it is 0, 1, 2 or 3."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"refill: expected an integer, got {type(value).__name__}.")
    if value not in range(4):
        raise ValueError(f"refill: expected 0, 1, 2 or 3, got {value}.")
    return value


def _check_tolerance(value: tuple[int, int]) -> tuple[int, int]:
    """Returns `value`; raises unless it is (m, n) with 0 <= m < n <= 10^6."""
    few, of_steps = value
    if not 0 <= few < of_steps <= _FINEST:
        raise ValueError(f"tolerance: expected (m, n) with 0 <= m < n <= 10**6, got {value}.")
    return few, of_steps
