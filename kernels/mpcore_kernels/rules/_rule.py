"""What the update kernel knows about an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """How one optimizer computes a step; the functions are under `@triton.jit`.

    Attributes:
        name: What callers know it by.
        apply: Float32, once per element: `apply(grad, param, moments, scalars)` returns the updated
            parameter and the tuple of updated moments. `grad` is unscaled and clipped, its sign
            turned where the optimizer maximizes.
        scalars: Float64, once per tensor and step: `scalars(numbers, t)` returns as many values as
            there are `columns`, the sign of the gradient first. `t` is the step count that this
            update makes, from 1. Each value is rounded to float32 once.
        numbers: Names of the hyper-parameters of a param group, lr first.
        columns: How many scalars there are.
        counts_steps: For each number of moments that a tensor may have, whether `t` matters then.
    """

    name: str
    apply: Any
    scalars: Any
    numbers: tuple[str, ...]
    columns: int
    counts_steps: Mapping[int, bool]
