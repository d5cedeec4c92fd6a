"""Loss scales as values, and the one rule by which a scale moves.

A loss scale is a frozen description; what changes during training is a `LossScaleState`.
`next_state` is the specification, in plain Python. `mpcore.scale_tensors` holds the same state in
device tensors and follows the same rule without a host sync.

Scaling multiplies the loss so that small gradients survive in 16 bits (Micikevicius et al.,
"Mixed Precision Training", ICLR 2018, section 3.2). The dynamic rule is "backoff" (Kuchaiev et
al., "Mixed-Precision Training for NLP and Speech Recognition with OpenSeq2Seq", 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from mpcore._checks import check_count, check_number, check_scale
from mpcore.errors import ArgumentError, ArgumentTypeError
from mpcore.headroom import HeadroomLossScale, next_headroom
from mpcore.presets import Presets

#: What fills the hysteresis up again besides growth, as backends are told: 1 for a clean step, 2
#: for backing off.
REFILLS = {"growth": 0, "clean": 1, "clean_or_backoff": 3}

#: What happens when a step overflows at `min_scale`.
AT_MIN = ("clamp", "warn", "raise")


@dataclass(frozen=True)
class DynamicLossScale(Presets):
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


@dataclass(frozen=True)
class StaticLossScale:
    """A scale that never moves. Gradients are still checked, and a step that overflows skipped.

    Args:
        scale: A power of two inside [2^-126, 2^126].

    Raises:
        ArgumentError: `scale` is not such a power of two.

    Example:
        >>> initial_state(StaticLossScale(1024)).scale
        1024.0
    """

    scale: float

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)


@dataclass(frozen=True)
class NoLossScale:
    """No scaling: the loss is used as it is. Gradients are still checked, bad steps skipped.

    Right for bfloat16, whose exponent range is that of float32, and for float32.

    Example:
        >>> initial_state(NoLossScale()).scale
        1.0
    """


LossScale = DynamicLossScale | HeadroomLossScale | StaticLossScale | NoLossScale


class LossScaleState(NamedTuple):
    """What a loss scale remembers between steps.

    Attributes:
        scale: What the next loss is multiplied by.
        growth_tracker: Clean steps since the last growth or overflow.
        overflows_left: Overflows that are still tolerated before the scale backs off.
        steps: Optimizer steps so far, skipped ones included.
        skipped_steps: Steps that were skipped.
        skips_in_a_row: The last ones of them, without a clean step between.
        overflows_at_min: How often the scale should have backed off at its minimum.
        steps_since_move: Steps since the scale grew or backed off.
        overflows_since_move: And how many of them were skipped.
        peak: For `HeadroomLossScale`: the largest gradient of this half of its window.
        peak_before: And of the half before.
    """

    scale: float
    growth_tracker: int
    overflows_left: int
    steps: int
    skipped_steps: int
    skips_in_a_row: int = 0
    overflows_at_min: int = 0
    steps_since_move: int = 0
    overflows_since_move: int = 0
    peak: float = 0.0
    peak_before: float = 0.0


# the finest share that a tolerance can be
_FINEST = 1_000_000
#: So many steps since the scale moved can be multiplied by `_FINEST` in int64.
COMPARABLE_STEPS = 2**42

#: The fields of a state that count steps, in the order in which tensors hold them.
COUNTERS = LossScaleState._fields[3:9]


def check_loss_scale(loss_scale: object) -> LossScale:
    """Returns `loss_scale`; raises `ArgumentTypeError` if it is not one of the four kinds."""
    if not isinstance(loss_scale, LossScale):
        raise ArgumentTypeError(
            "loss_scale: expected DynamicLossScale(...), HeadroomLossScale(...), "
            f"StaticLossScale(scale) or NoLossScale(), got {loss_scale!r}. For a fixed "
            "scale pass mpcore.StaticLossScale(1024.0)."
        )
    return loss_scale


def initial_state(loss_scale: LossScale) -> LossScaleState:
    """Returns the state before the first step."""
    if isinstance(loss_scale, DynamicLossScale):
        return LossScaleState(float(loss_scale.init), 0, loss_scale.hysteresis, 0, 0)
    if isinstance(loss_scale, HeadroomLossScale):
        return LossScaleState(float(loss_scale.init), 0, 0, 0, 0)
    scale = loss_scale.scale if isinstance(loss_scale, StaticLossScale) else 1.0
    return LossScaleState(float(scale), 0, 0, 0, 0)


def resumed_state(loss_scale: LossScale, saved: LossScaleState) -> LossScaleState:
    """Returns `saved` as `loss_scale` goes on from it: its own scale, or the saved one in bounds.

    The settings of a run may change between saving and loading, and they win.
    """
    own = initial_state(loss_scale)
    if isinstance(loss_scale, (StaticLossScale, NoLossScale)):
        return own._replace(**{name: getattr(saved, name) for name in COUNTERS[:3]})
    scale = min(max(saved.scale, loss_scale.min_scale), loss_scale.max_scale)
    if isinstance(loss_scale, HeadroomLossScale):
        return saved._replace(scale=scale, overflows_left=0)
    left = min(saved.overflows_left, loss_scale.hysteresis)
    return saved._replace(scale=scale, overflows_left=left, peak=0.0, peak_before=0.0)


def next_state(
    loss_scale: LossScale, state: LossScaleState, *, found_inf: bool, largest: float = 0.0
) -> LossScaleState:
    """Returns the state after one step: the specification that every implementation follows.

    Args:
        loss_scale: The description; static ones never move.
        state: The state before the step.
        found_inf: Whether a gradient of the step was not finite.
        largest: Largest magnitude of unscaled float16 gradients, for a `HeadroomLossScale`.
    """
    counted = state._replace(
        steps=state.steps + 1,
        skipped_steps=state.skipped_steps + int(found_inf),
        skips_in_a_row=state.skips_in_a_row + 1 if found_inf else 0,
    )
    if isinstance(loss_scale, HeadroomLossScale):
        return next_headroom(loss_scale, counted, found_inf, largest)
    if not isinstance(loss_scale, DynamicLossScale):
        return counted
    counted = counted._replace(
        steps_since_move=state.steps_since_move + 1,
        overflows_since_move=state.overflows_since_move + int(found_inf),
    )
    if found_inf:
        return _after_overflow(loss_scale, counted)
    if state.growth_tracker + 1 < loss_scale.growth_interval:
        kept = state.overflows_left if loss_scale.refill == "growth" else loss_scale.hysteresis
        return counted._replace(growth_tracker=state.growth_tracker + 1, overflows_left=kept)
    return counted._replace(
        scale=min(state.scale * loss_scale.growth_factor, loss_scale.max_scale),
        growth_tracker=0,
        overflows_left=loss_scale.hysteresis,
        steps_since_move=0,
        overflows_since_move=0,
    )


def _after_overflow(loss_scale: DynamicLossScale, state: LossScaleState) -> LossScaleState:
    """Returns what follows a step that overflowed and has been counted."""
    left = max(state.overflows_left - 1, 0)
    few, of_steps = tolerated(loss_scale.tolerance)
    if left > 0 or state.overflows_since_move * of_steps < few * state.steps_since_move:
        return state._replace(growth_tracker=0, overflows_left=left)
    refilled = loss_scale.refill == "clean_or_backoff"
    return state._replace(
        scale=max(state.scale * loss_scale.backoff_factor, loss_scale.min_scale),
        growth_tracker=0,
        overflows_left=loss_scale.hysteresis if refilled else 0,
        overflows_at_min=state.overflows_at_min + int(state.scale <= loss_scale.min_scale),
        steps_since_move=0,
        overflows_since_move=0,
    )


@cache
def tolerated(tolerance: float) -> tuple[int, int]:
    """Returns a tolerance in whole numbers, which every device multiplies without rounding.

    Example:
        >>> tolerated(0.05)  # one of twenty
        (1, 20)
    """
    ratio = Fraction(tolerance).limit_denominator(_FINEST)
    return min(ratio, Fraction(_FINEST - 1, _FINEST)).as_integer_ratio()
