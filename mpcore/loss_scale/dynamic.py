"""The loss scale that is searched for: it grows while steps are clean and backs off on overflow.

The rule is "backoff" (Kuchaiev et al., "Mixed-Precision Training for NLP and Speech Recognition
with OpenSeq2Seq", 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from torch import Tensor

from mpcore.base import check_count, check_number, check_scale
from mpcore.errors import ArgumentError
from mpcore.loss_scale.kind import LossScale, Update
from mpcore.loss_scale.move import ScaleMove, update_scale_
from mpcore.loss_scale.presets import Presets
from mpcore.loss_scale.state import LossScaleState
from mpcore.loss_scale.tensors import LossScaleTensors

#: What fills the hysteresis up again besides growth, as backends are told: 1 for a clean step, 2
#: for backing off.
REFILLS = {"growth": 0, "clean": 1, "clean_or_backoff": 3}

#: What happens when a step overflows at `min_scale`.
AT_MIN = ("clamp", "warn", "raise")

# the finest share that a tolerance can be
_FINEST = 1_000_000


@dataclass(frozen=True)
class DynamicLossScale(Presets, LossScale):
    """A scale that grows while training is clean and backs off when a gradient overflows.

    ```
    on overflow:  the step is skipped;  tracker = 0;  budget -= 1
        if budget <= 0 and overflows >= tolerance * steps  (both since the scale last moved):
            scale = max(scale * backoff_factor, min_scale)
            if refill == "clean_or_backoff":  budget = hysteresis
    on a clean step:  tracker += 1
        if refill != "growth":  budget = hysteresis
        if tracker == growth_interval:
            scale = min(scale * growth_factor, max_scale);  tracker = 0;  budget = hysteresis
    ```

    `DynamicLossScale.torch()`, `keras2()`, `keras3()`, `jmp()`, `flax()`, `apex()`, `megatron()`,
    `deepspeed()`, `fairseq()` and `paddle()` are the scales of those systems.

    Args:
        init: First scale, a power of two within `[min_scale, max_scale]`.
        growth_factor: What growth multiplies by, a power of two above 1.
        backoff_factor: What an overflow multiplies by, a power of two below 1.
        growth_interval: Clean steps in a row before the scale grows.
        min_scale: Floor, a power of two of at least 2^-126. The scale never reaches 0.
        max_scale: Ceiling, a power of two of at most 2^126. The scale never reaches infinity.
        hysteresis: Overflows tolerated between two growths: the scale backs off at the
            `hysteresis`-th one and at every later one, until it grows. 1 backs off at once.
        refill: When overflows are tolerated anew: "growth"; "clean", after any clean step too, so
            that only overflows in a row count and ones that alternate with clean steps never lower
            the scale; "clean_or_backoff", after backing off as well.
        tolerance: Share of steps that may overflow, from 0 to below 1: the scale backs off once
            that many of the steps since it last moved did. A fraction of at most a millionth.
        at_min: When a step overflows at `min_scale`: "clamp" stays there, "warn" warns too, "raise"
            raises `LossScaleError` from `step()`. On a GPU some steps later: nothing syncs.

    Raises:
        ArgumentError: A factor or bound is not a power of two, or the bounds are out of order.
        ArgumentTypeError: An argument is not a number.

    Example:
        >>> from mpcore.loss_scale import initial_state, next_state
        >>> scale = DynamicLossScale(init=2.0**10, growth_interval=2)
        >>> state = initial_state(scale)
        >>> state = next_state(scale, state, found_inf=True)
        >>> state.scale
        512.0
        >>> for _ in range(2):
        ...     state = next_state(scale, state, found_inf=False)
        >>> state.scale
        1024.0
    """

    init: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    hysteresis: int = 1
    refill: str = "growth"
    tolerance: float = 0.0
    at_min: str = "clamp"

    def __post_init__(self) -> None:
        check_scale("min_scale", self.min_scale)
        check_scale("max_scale", self.max_scale)
        check_scale("init", self.init)
        if not self.min_scale <= self.init <= self.max_scale:
            raise ArgumentError(
                f"init: expected a scale within [min_scale, max_scale] = [{self.min_scale:g}, "
                f"{self.max_scale:g}], got {self.init:g}. Widen the bounds or move init."
            )
        if not check_scale("growth_factor", self.growth_factor) > 1:
            raise ArgumentError(
                f"growth_factor: expected a power of two above 1, got {self.growth_factor:g}. "
                "Usually 2.0."
            )
        if not check_scale("backoff_factor", self.backoff_factor) < 1:
            raise ArgumentError(
                f"backoff_factor: expected a power of two below 1, got {self.backoff_factor:g}. "
                "Usually 0.5."
            )
        check_count("growth_interval", self.growth_interval)
        check_count("hysteresis", self.hysteresis)
        for name, known in (("refill", tuple(REFILLS)), ("at_min", AT_MIN)):
            if getattr(self, name) not in known:
                raise ArgumentError(
                    f"{name}: expected one of {', '.join(map(repr, known))}, got "
                    f"{getattr(self, name)!r}."
                )
        if not 0 <= check_number("tolerance", self.tolerance) < 1:
            raise ArgumentError(
                f"tolerance: expected a share from 0 to below 1, got {self.tolerance!r}."
            )

    def first(self) -> LossScaleState:
        """Returns the state before the first step."""
        return LossScaleState(float(self.init), 0, self.hysteresis, 0, 0)

    def resumed(self, saved: LossScaleState) -> LossScaleState:
        """Returns a saved state with its scale and its budget within the bounds of now."""
        scale = min(max(saved.scale, self.min_scale), self.max_scale)
        left = min(saved.overflows_left, self.hysteresis)
        return saved._replace(scale=scale, overflows_left=left, peak=0.0, peak_before=0.0)

    def after(self, state: LossScaleState, *, found_inf: bool, largest: float) -> LossScaleState:
        """Returns what follows a step that has been counted; see the class."""
        counted = state._replace(
            steps_since_move=state.steps_since_move + 1,
            overflows_since_move=state.overflows_since_move + int(found_inf),
        )
        if found_inf:
            return self._after_overflow(counted)
        if state.growth_tracker + 1 < self.growth_interval:
            kept = state.overflows_left if self.refill == "growth" else self.hysteresis
            return counted._replace(growth_tracker=state.growth_tracker + 1, overflows_left=kept)
        return counted._replace(
            scale=min(state.scale * self.growth_factor, self.max_scale),
            growth_tracker=0,
            overflows_left=self.hysteresis,
            steps_since_move=0,
            overflows_since_move=0,
        )

    def _after_overflow(self, state: LossScaleState) -> LossScaleState:
        left = max(state.overflows_left - 1, 0)
        few, of_steps = tolerated(self.tolerance)
        if left > 0 or state.overflows_since_move * of_steps < few * state.steps_since_move:
            return state._replace(growth_tracker=0, overflows_left=left)
        refilled = self.refill == "clean_or_backoff"
        return state._replace(
            scale=max(state.scale * self.backoff_factor, self.min_scale),
            growth_tracker=0,
            overflows_left=self.hysteresis if refilled else 0,
            overflows_at_min=state.overflows_at_min + int(state.scale <= self.min_scale),
            steps_since_move=0,
            overflows_since_move=0,
        )

    def move(self, tensors: LossScaleTensors) -> ScaleMove:
        """Returns how the scale in these tensors moves at the end of a step."""
        return ScaleMove(
            scale=tensors.scale,
            growth_tracker=tensors.growth_tracker,
            overflows_left=tensors.overflows_left,
            counters=tensors.counters,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
            min_scale=self.min_scale,
            max_scale=self.max_scale,
            hysteresis=self.hysteresis,
            refill=REFILLS[self.refill],
            tolerance=tolerated(self.tolerance),
        )

    def advance_(
        self,
        tensors: LossScaleTensors,
        found_inf: Tensor,
        update: Update = update_scale_,
        largest: Tensor | None = None,
    ) -> None:
        """Moves and counts by the backend's `update_scale_`; no host sync."""
        update(self.move(tensors), found_inf)


@cache
def tolerated(tolerance: float) -> tuple[int, int]:
    """Returns a tolerance in whole numbers, which every device multiplies without rounding.

    Example:
        >>> tolerated(0.05)  # one of twenty
        (1, 20)
    """
    ratio = Fraction(tolerance).limit_denominator(_FINEST)
    return min(ratio, Fraction(_FINEST - 1, _FINEST)).as_integer_ratio()
