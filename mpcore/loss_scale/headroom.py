"""A loss scale that is computed from the largest gradient instead of being searched for.

A search by growth and backoff ("backoff") has to overflow now and then to learn where the ceiling
is. The largest gradient of each step tells it without that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpcore.base import check_count, check_scale
from mpcore.errors import ArgumentError
from mpcore.loss_scale.kind import LossScale, Update
from mpcore.loss_scale.move import count_step_, update_scale_
from mpcore.loss_scale.state import LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors

# float16 holds magnitudes below 2^16 (65504)
_BITS = 16


@dataclass(frozen=True)
class HeadroomLossScale(LossScale):
    """The largest power of two that leaves room above the largest float16 gradient.

    ```
    on a clean step:  peak = max(peak, largest unscaled float16 gradient)
                      scale = 2^(16 - spare_bits) / (the next power of two above the peak)
    on overflow:      the step is skipped;  scale = scale * backoff_factor, and the peak is set to
                      what that scale leaves room for
    ```

    The peak is that of the last `window / 2` to `window` clean steps. Scales stay within
    [`min_scale`, `max_scale`]. Without a float16 gradient the scale stays. Gradients inside of the
    backward pass may be larger than those of the weights: that is what `spare_bits` and the backoff
    are for.

    Args:
        init: First scale, a power of two within `[min_scale, max_scale]`.
        spare_bits: Powers of two left free above the peak, 1 to 15.
        window: Clean steps that a peak counts, at least 2.
        backoff_factor: What an overflow multiplies by, a power of two below 1.
        min_scale: Floor, a power of two.
        max_scale: Ceiling, a power of two.

    Raises:
        ArgumentError: A number is impossible, or the bounds are out of order.

    Example:
        >>> from mpcore.loss_scale import initial_state, next_state
        >>> scale = HeadroomLossScale(spare_bits=2)
        >>> state = next_state(scale, initial_state(scale), found_inf=False, largest=2.0**-12)
        >>> state.scale == 2.0**25  # times 2^-12: 2^13, and 65504 is almost 2^16
        True
    """

    wants_largest: ClassVar[bool] = True

    init: float = 2.0**16
    spare_bits: int = 2
    window: int = 100
    backoff_factor: float = 0.5
    min_scale: float = 1.0
    max_scale: float = 2.0**32

    def __post_init__(self) -> None:
        for name in ("min_scale", "max_scale", "init", "backoff_factor"):
            check_scale(name, getattr(self, name))
        if not self.min_scale <= self.init <= self.max_scale:
            raise ArgumentError(
                f"init: expected a scale within [min_scale, max_scale] = [{self.min_scale:g}, "
                f"{self.max_scale:g}], got {self.init:g}. Widen the bounds or move init."
            )
        if not self.backoff_factor < 1:
            raise ArgumentError(
                f"backoff_factor: expected a power of two below 1, got {self.backoff_factor:g}. "
                "Usually 0.5."
            )
        if not check_count("spare_bits", self.spare_bits) < _BITS:
            raise ArgumentError(f"spare_bits: expected 1 to 15, got {self.spare_bits}.")
        if check_count("window", self.window) < 2:
            raise ArgumentError(f"window: expected at least 2 steps, got {self.window}.")

    @property
    def half_window(self) -> int:
        """Clean steps after which the older of two peaks is forgotten."""
        return (self.window + 1) // 2

    def first(self) -> LossScaleState:
        """Returns the state before the first step."""
        return LossScaleState(float(self.init), 0, 0, 0, 0)

    def resumed(self, saved: LossScaleState) -> LossScaleState:
        """Returns a saved state with its scale within the bounds of now."""
        scale = min(max(saved.scale, self.min_scale), self.max_scale)
        return saved._replace(scale=scale, overflows_left=0)

    def after(self, state: LossScaleState, *, found_inf: bool, largest: float) -> LossScaleState:
        """Returns what follows a step that has been counted; see the class."""
        if found_inf:
            lower = max(state.scale * self.backoff_factor, self.min_scale)
            edge = 2.0 ** (_BITS - 1 - self.spare_bits) / lower
            return state._replace(scale=lower, peak=max(state.peak, edge))
        peak = max(state.peak, largest)
        top = max(peak, state.peak_before)
        scale = state.scale
        if top > 0:
            scale = 2.0 ** (_BITS - self.spare_bits - math.frexp(top)[1])
            scale = min(max(scale, self.min_scale), self.max_scale)
        if state.growth_tracker + 1 < self.half_window:
            return state._replace(scale=scale, peak=peak, growth_tracker=state.growth_tracker + 1)
        return state._replace(scale=scale, peak=0.0, peak_before=peak, growth_tracker=0)

    @torch.no_grad()
    def advance_(
        self,
        tensors: LossScaleTensors,
        found_inf: Tensor,
        update: Update = update_scale_,
        largest: Tensor | None = None,
    ) -> None:
        """Follows `after` in place on the device and counts the step; no host sync."""
        bad = found_inf != 0
        wide = tensors.scale.double()
        lower = (wide * self.backoff_factor).clamp_(min=self.min_scale)
        edge = 2.0 ** (_BITS - 1 - self.spare_bits) / lower
        largest = torch.zeros_like(tensors.peak) if largest is None else largest
        peak = torch.maximum(tensors.peak, torch.where(bad, edge, largest))
        top = torch.maximum(peak, tensors.peak_before)
        exponent = _BITS - self.spare_bits - torch.frexp(top)[1]
        wanted = torch.ldexp(torch.ones_like(top), exponent)
        wanted = wanted.clamp_(self.min_scale, self.max_scale)
        clean = torch.where(top > 0, wanted, wide)
        tensors.scale.copy_(torch.where(bad, lower, clean))
        tracker = tensors.growth_tracker + bad.logical_not()
        full = tracker >= self.half_window
        tensors.peak_before.copy_(torch.where(full, peak, tensors.peak_before))
        tensors.peak.copy_(torch.where(full, torch.zeros_like(peak), peak))
        tensors.growth_tracker.copy_(torch.where(full, torch.zeros_like(tracker), tracker))
        count_step_(tensors.counters, found_inf)
