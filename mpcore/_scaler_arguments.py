"""Checks of what a GradScaler is given; they raise what `torch.amp.GradScaler` raises."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterable
from typing import Any, SupportsIndex

from torch import Tensor

from mpcore._checks import LARGEST_SCALE, SIXTEEN_BIT, SMALLEST_SCALE
from mpcore.loss_scale import AT_MIN, COMPARABLE_STEPS, REFILLS, LossScaleState

# what a state_dict holds besides torch's keys
EXTRAS = ("min_scale", "max_scale", "hysteresis", "refill", "tolerance", "at_min")
#: And of a loss scale's state: all but the scale and the tracker, which are torch's.
NAMES = tuple(f"_{name}" for name in LossScaleState._fields[2:])
# the lowest number that each integer may be
_COUNTS = {
    "growth_interval": 1,
    "hysteresis": 1,
    "_growth_tracker": 0,
    **dict.fromkeys(NAMES[:-2], 0),
}

LARGEST_INT32 = 2**31 - 1


def checked_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a complete state; raises and changes nothing if it is none.

    Counters that a checkpoint of torch's does not have are those of a new scaler, and a scale
    outside of the bounds is brought back to them: torch's may be 0 or infinite.

    Args:
        state: torch's keys and `EXTRAS`.

    Raises:
        KeyError: A key is missing.
        AssertionError: A number is impossible.
    """
    low, high = float(state["min_scale"]), float(state["max_scale"])
    check_bounds(low, high)
    if math.isnan(state["scale"]):
        raise AssertionError("The scale must be a number, and this state has NaN.")
    check_factor("growth factor", state["growth_factor"], 1.0, math.inf)
    check_factor("backoff factor", state["backoff_factor"], 0.0, 1.0)
    check_choices(state["refill"], state["tolerance"], state["at_min"])
    fresh = dict(zip(NAMES, LossScaleState(0.0, 0, state["hysteresis"], 0, 0)[2:], strict=True))
    whole = {**fresh, **state, "scale": min(max(state["scale"], low), high)}
    for key, lowest in _COUNTS.items():
        whole[key] = check_count(key.strip("_").replace("_", " "), whole[key], lowest)
    # the tracker is counted up before it is compared
    whole["_growth_tracker"] = min(whole["_growth_tracker"], LARGEST_INT32 - 1)
    for key in NAMES[-2:]:
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
    if not SMALLEST_SCALE <= low <= high <= LARGEST_SCALE:
        raise AssertionError(
            f"The bounds must be 2**-126 <= min_scale <= max_scale <= 2**126, got {low:g} and "
            f"{high:g}."
        )


def check_in_bounds(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise AssertionError(f"{name} must be within [{low:g}, {high:g}], got {value!r}.")


def check_factor(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise AssertionError(f"The {name} must be > {low} and < {high}, got {value!r}.")


def check_count(name: str, value: SupportsIndex, lowest: int = 1) -> int:
    """Returns an integer, NumPy's too, that counters on a device can hold."""
    number = operator.index(value) if hasattr(value, "__index__") else -1
    if isinstance(value, bool) or not lowest <= number < 2**63:
        raise AssertionError(f"The {name} must be an integer >= {lowest}, got {value!r}.")
    return number


def check_choices(refill: str, tolerance: float, at_min: str) -> None:
    if refill not in REFILLS:
        raise AssertionError(f"refill must be one of {', '.join(REFILLS)}, got {refill!r}.")
    if not 0 <= tolerance < 1:
        raise AssertionError(f"tolerance must be >= 0 and < 1, got {tolerance!r}.")
    if at_min not in AT_MIN:
        raise AssertionError(f"at_min must be one of {', '.join(AT_MIN)}, got {at_min!r}.")
