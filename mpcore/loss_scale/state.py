"""What a loss scale remembers between steps, and its counters by name."""

from __future__ import annotations

from typing import NamedTuple


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


#: The fields of a state that count steps, in the order in which tensors hold them.
COUNTERS = (
    "steps",
    "skipped_steps",
    "skips_in_a_row",
    "overflows_at_min",
    "steps_since_move",
    "overflows_since_move",
)

#: The others, each of which is a tensor of its own.
SINGLE = ("scale", "growth_tracker", "overflows_left", "peak", "peak_before")

#: So many steps since the scale moved can be multiplied by the terms of a tolerance in int64.
COMPARABLE_STEPS = 2**42
