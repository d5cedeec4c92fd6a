"""float64 numbers that know how far a float32 computation of them may be, and rounding by hand.

Running error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.3): each
operation adds what it may round away to what its operands bring along. NumPy alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Bits of the significand, the exponent of the smallest normal number, the largest number.
FORMATS = {
    "float16": (11, -14, 65504.0),
    "bfloat16": (8, -126, float.fromhex("0x1.fep127")),
    "float32": (24, -126, float.fromhex("0x1.fffffep127")),
}
#: What one operation may be off by: a float32 rounding is 2^-24 at most, and torch's kernels take
#: up to three more of them than a formula has (`lerp`, `addcdiv`, a hyper-parameter in float32).
ROUNDING = 4 * 2.0**-24


def rounded(values: Any, dtype: str, *, saturates: bool = False) -> Any:
    """Values of a dtype, nearest even; beyond the largest one infinity, or that where it saturates.

    `saturates` is for weights: infinities stay infinite.
    """
    digits, lowest, largest = FORMATS[dtype]
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        exponent = np.frexp(values)[1]  # 0 for what is not finite, which stays as it is
        quantum = np.exp2(np.maximum(exponent, lowest + 1) - digits)
        result = np.where(np.isfinite(values), np.rint(values / quantum) * quantum, values)
        beyond = np.isfinite(result) & (np.abs(result) > largest)
        return np.where(beyond, np.copysign(largest if saturates else np.inf, result), result)


def same(left: Any, right: Any) -> Any:
    """Where two arrays are the same number: a NaN is any NaN, and -0.0 is not 0.0."""
    equal = (left == right) & (np.signbit(left) == np.signbit(right))
    return equal | (np.isnan(left) & np.isnan(right))


class Near:
    """An array in float64 and, for each element, how far a float32 computation of it may be."""

    def __init__(self, value: Any, error: Any = 0.0) -> None:
        self.value = np.asarray(value, dtype=np.float64)
        self.error = error  # an array, or one number for all elements

    @property
    def exact(self) -> bool:
        return not np.any(self.error)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.value).all())

    def holds(self, other: Any) -> bool:
        """Whether `other` can be this; without an error only the same number can."""
        if self.value.tobytes() == other.tobytes():  # usually
            return True
        with np.errstate(all="ignore"):
            close = np.isfinite(self.value) & (np.abs(other - self.value) <= self.error)
        return bool((close | same(self.value, other) | (self.value == other)).all())

    def times_power_of_two(self, factor: float) -> Near:
        """Exact as long as nothing under- or overflows."""
        with np.errstate(all="ignore"):
            return Near(self.value * factor, self.error * factor)

    def __add__(self, other: Any) -> Near:
        other = _near(other)
        return _result(np.add, self, other, self.error + other.error)

    def __sub__(self, other: Any) -> Near:
        other = _near(other)
        return _result(np.subtract, self, other, self.error + other.error)

    def __mul__(self, other: Any) -> Near:
        other = _near(other)
        with np.errstate(all="ignore"):
            error = np.abs(self.value) * other.error + self.error * (
                np.abs(other.value) + other.error
            )
        return _result(np.multiply, self, other, error)

    def __truediv__(self, other: Any) -> Near:
        other = _near(other)
        with np.errstate(all="ignore"):
            room = np.abs(other.value) - other.error  # divisors are away from 0
            error = (self.error + np.abs(self.value / other.value) * other.error) / room
        return _result(np.divide, self, other, error)

    def sqrt(self) -> Near:
        with np.errstate(all="ignore"):
            low = np.sqrt(np.maximum(self.value - self.error, 0.0))
            error = np.maximum(np.sqrt(self.value + self.error) - low, 0.0)
            root = np.sqrt(self.value)
            return Near(root, error + ROUNDING * np.abs(root))

    def sign(self) -> Near:
        """Its error is 2 where float32 may see the other sign."""
        unsure = (np.abs(self.value) <= self.error) & (self.error > 0)
        return Near(np.sign(self.value), np.where(unsure, 2.0, 0.0))


def _near(value: Any) -> Near:
    return value if isinstance(value, Near) else Near(value)


def _result(operation: Any, left: Near, right: Near, error: Any) -> Near:
    with np.errstate(all="ignore"):
        value = operation(left.value, right.value)
        return Near(value, error + ROUNDING * np.abs(value))
