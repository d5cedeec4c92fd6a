"""What the model of the sequences knows of an optimizer, as it should be. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpcore_testing.sequences.look import Look
from mpcore_testing.sequences.numbers import Near
from mpcore_testing.sequences.optimizers import MOMENTS, RATES
from mpcore_testing.sequences.scales import Scale

#: Of each parameter: dtype, param group and first values.
PARAMETERS: list[tuple[str, int, list[float]]] = [
    ("float16", 0, [1.0, -2.0, 0.5]),
    ("bfloat16", 0, [0.75, -0.25, 3.0, -1.5]),
    ("float32", 1, [1.25, -0.5]),
    ("float16", 1, [-0.75, 2.0]),
]
EVERY = range(len(PARAMETERS))
HALVES = [i for i in EVERY if PARAMETERS[i][0] != "float32"]


class Refused(Exception):
    """A call out of turn: an engine raises a StageError."""


@dataclass
class State:
    """One optimizer over `PARAMETERS`, as it should be.

    Attributes:
        optimizer: A key of `RATES`.
        scale: The loss scale.
        fused: Whether float32 gradients stay scaled in `p.grad` until somebody unscales them.
        weights: What the model's parameters hold; None: the rounded master.
        masters: In float32; the weight itself of a float32 parameter or before the first gradient.
        made: Who has a master.
        own: The model's own gradients, as they are in memory.
        left: Gradients that a step has left there: the scale in them, None if they are unscaled.
        sums: What `accumulate` has added up, and whether any of it was not finite, and the largest.
        look: What `unscale_` or a clip has seen in this step.
        failed: Gradients of a step that failed: another pass may replace them.
    """

    optimizer: str
    scale: Scale
    fused: bool
    weights: list[Any] = field(default_factory=lambda: [np.array(v) for _, _, v in PARAMETERS])
    masters: list[Near] = field(default_factory=lambda: [Near(v) for _, _, v in PARAMETERS])
    moments: list[list[Near]] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0 for _ in EVERY])
    made: set[int] = field(default_factory=set)
    own: list[Near | None] = field(default_factory=lambda: [None for _ in EVERY])
    left: dict[int, float | None] = field(default_factory=dict)
    sums: dict[int, Near] | None = None
    sums_found: set[int] = field(default_factory=set)
    sums_largest: float = 0.0
    look: Look | None = None
    failed: dict[int, Near] = field(default_factory=dict)
    scaled: bool = False
    zeroed: bool = False
    began: bool = False
    never_fitted: set[int] = field(default_factory=set)
    warned: set[int] = field(default_factory=set)
    adopted: int = 0  # elements that the next warning is about
    last: tuple[bool, float] | None = None  # skipped, loss scale
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        rate = RATES[self.optimizer]
        self.rates = [rate, rate / 2]
        zeros = [Near(np.zeros(len(v))) for _, _, v in PARAMETERS]
        self.moments = [[zero] * len(MOMENTS[self.optimizer]) for zero in zeros]
