"""Argument checks shared by every module, with one message format: expected, got, what to do."""

from __future__ import annotations

import math

import torch

from mpcore.errors import ArgumentError, ArgumentTypeError

#: A scale and its reciprocal are both normal float32 numbers inside this range.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
FULL_PRECISION = (torch.float32, torch.float64)


def is_power_of_two(value: float) -> bool:
    """Whether `value` is an exact power of two, fractions included."""
    return math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5


def check_scale(name: str, value: float) -> float:
    """Returns `value` as a float; raises unless it is a power of two inside [2^-126, 2^126]."""
    number = check_number(name, value)
    if not is_power_of_two(number) or not SMALLEST_SCALE <= number <= LARGEST_SCALE:
        raise ArgumentError(
            f"{name}: expected a power of two between 2**-126 and 2**126, got {value!r}. "
            "Powers of two make scaling and unscaling exact; take the nearest one."
        )
    return number


def check_number(name: str, value: int | float) -> float:
    """Returns `value` as a float; raises unless it is a real number (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__}.")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(
            f"{name}: expected a number that fits a float, got an integer beyond 2**1024."
        ) from None


def check_count(name: str, value: int) -> int:
    """Returns `value`; raises unless it is an integer from 1 to 2^31 - 1 (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name}: expected an integer, got {type(value).__name__}.")
    if not 1 <= value < 2**31:
        raise ArgumentError(f"{name}: expected an integer from 1 to 2**31 - 1, got {value}.")
    return value
