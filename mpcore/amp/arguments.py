"""What a GradScaler is given: brought within bounds if torch takes it, refused if nobody can."""

from __future__ import annotations

import math
import operator
import struct
import warnings
from collections.abc import Iterable
from typing import Any, SupportsIndex, TypeVar

from torch import Tensor

from mpcore.base import LARGEST_SCALE, SIXTEEN_BIT, SMALLEST_SCALE
from mpcore.loss_scale import AT_MIN, COMPARABLE_STEPS, COUNTERS, REFILLS, LossScaleState

# what a state_dict holds besides torch's keys
EXTRAS = ("min_scale", "max_scale", "hysteresis", "refill", "tolerance", "at_min")
#: And of a loss scale's state: all but the scale and the tracker, which are torch's.
NAMES = {f"_{name}": name for name in ("overflows_left", *COUNTERS, "peak", "peak_before")}
# the lowest number that each integer may be
_COUNTS = {
    "hysteresis": 1,
    **{f"_{name}": 0 for name in ("overflows_left", *COUNTERS)},
}

LARGEST_INT32 = 2**31 - 1

_Number = TypeVar("_Number", int, float)


class Settings:
    """Brings the settings that torch takes to where ours can be, and tells what has changed."""

    def __init__(self) -> None:
        self._changes: list[str] = []

    def warn(self, stacklevel: int) -> None:
        """Warns once, of everything that is used otherwise than it was given."""
        if self._changes:
            warnings.warn(
                f"GradScaler: {'; '.join(self._changes)}. torch.amp.GradScaler takes such settings "
                "as they are; write what is used to have no warning.",
                stacklevel=stacklevel + 1,
            )

    def scale(self, name: str, value: float, low: float, high: float) -> float:
        """Returns a scale within its bounds."""
        return self._within(name, value, low, high, f"bounds are {low:g} and {high:g}")

    def growth_factor(self, value: float) -> float:
        """Returns a factor from 1 to 2^126."""
        if value > LARGEST_SCALE:  # the product is infinite: torch leaves the scale as it is
            return self._use("growth factor", value, 1.0, "no larger scale is finite")
        return self._within("growth factor", value, 1.0, LARGEST_SCALE, "the scale only grows")

    def backoff_factor(self, value: float) -> float:
        """Returns a factor from 2^-126 to 1."""
        why = "the scale falls, to min_scale at the lowest"
        return self._within("backoff factor", value, SMALLEST_SCALE, 1.0, why)

    def growth_interval(self, value: SupportsIndex) -> int:
        """Returns an interval of at least 1; torch's scale never grows with another."""
        number = check_count("growth interval", value, None)
        if number >= 1:
            return number
        return self._use("growth interval", number, LARGEST_INT32, "the scale never grows")

    def growth_tracker(self, value: SupportsIndex) -> int:
        """Returns a tracker that can be counted up before it is compared."""
        number = check_count("growth tracker", value, None)
        if number < 0:
            return self._use("growth tracker", number, 0, "no fewer steps are possible")
        return min(number, LARGEST_INT32 - 1)

    def _within(self, name: str, value: float, low: float, high: float, why: str) -> float:
        if math.isnan(value):
            raise AssertionError(f"The {name} must be a number, got NaN.")
        number = float(value)
        used = min(max(number, low), high)
        return number if used == number else self._use(name, value, used, why)

    def _use(self, name: str, value: object, used: _Number, why: str) -> _Number:
        self._changes.append(f"the {name} {value!r} is used as {used:g} ({why})")
        return used


def checked_state(state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Returns a complete state; raises and changes nothing if it is none.

    Counters that a checkpoint of torch's does not have are those of a new scaler, and torch's own
    entries are brought back to our bounds: its scale may be 0 or infinite.

    Args:
        state: torch's keys and `EXTRAS`.
        settings: Brings torch's entries within bounds.

    Raises:
        KeyError: A key is missing.
        AssertionError: A number is impossible.
    """
    low, high = float(state["min_scale"]), float(state["max_scale"])
    check_bounds(low, high)
    of_torch = {
        "scale": settings.scale("scale", state["scale"], low, high),
        "growth_factor": settings.growth_factor(state["growth_factor"]),
        "backoff_factor": settings.backoff_factor(state["backoff_factor"]),
        "growth_interval": settings.growth_interval(state["growth_interval"]),
        "_growth_tracker": settings.growth_tracker(state["_growth_tracker"]),
    }
    check_choices(state["refill"], state["tolerance"], state["at_min"])
    first = LossScaleState(0.0, 0, state["hysteresis"], 0, 0)
    fresh = {key: getattr(first, name) for key, name in NAMES.items()}
    whole = {**fresh, **state, **of_torch}
    for key, lowest in _COUNTS.items():
        whole[key] = check_count(key.strip("_").replace("_", " "), whole[key], lowest)
    for key in ("_peak", "_peak_before"):
        if not isinstance(whole[key], float) or not 0 <= whole[key] < math.inf:
            raise AssertionError(f"{key} must be a finite number >= 0, got {whole[key]!r}.")
    for key in ("_steps_since_move", "_overflows_since_move"):
        whole[key] = min(whole[key], COMPARABLE_STEPS)  # they are multiplied by up to 10^6
    left = min(whole["_overflows_left"], whole["hysteresis"], LARGEST_INT32)
    return {**whole, "_overflows_left": left, "min_scale": low, "max_scale": high}


def is_float32(value: float) -> bool:
    """Whether a number is one of float32.

    Example:
        >>> is_float32(1.5), is_float32(0.8)
        (True, False)
    """
    return bool(struct.unpack("f", struct.pack("f", value))[0] == value)


def widened(outputs: Any) -> Any:
    """Returns outputs with 16-bit tensors in float32."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in SIXTEEN_BIT else outputs
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(map(widened, outputs))
    return map(widened, outputs) if isinstance(outputs, Iterable) else outputs


def check_bounds(low: float, high: float) -> None:
    """Raises, as torch does, unless a scale can stay within these."""
    if not SMALLEST_SCALE <= low <= high <= LARGEST_SCALE:
        raise AssertionError(
            f"The bounds must be 2**-126 <= min_scale <= max_scale <= 2**126, got {low:g} and "
            f"{high:g}."
        )


def check_count(name: str, value: SupportsIndex, lowest: int | None = 1) -> int:
    """Returns an integer, NumPy's too, that counters on a device can hold; `lowest` None: any."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    number = operator.index(value) if is_integer else -(2**63)
    if not (-(2**63) + 1 if lowest is None else lowest) <= number < 2**63:
        least = "" if lowest is None else f" >= {lowest}"
        raise AssertionError(f"The {name} must be an integer{least}, got {value!r}.")
    return number


def check_choices(refill: str, tolerance: float, at_min: str) -> None:
    """Raises, as torch does, unless these settings of a `DynamicLossScale` are known."""
    if refill not in REFILLS:
        raise AssertionError(f"refill must be one of {', '.join(REFILLS)}, got {refill!r}.")
    if not 0 <= tolerance < 1:
        raise AssertionError(f"tolerance must be >= 0 and < 1, got {tolerance!r}.")
    if at_min not in AT_MIN:
        raise AssertionError(f"at_min must be one of {', '.join(AT_MIN)}, got {at_min!r}.")
