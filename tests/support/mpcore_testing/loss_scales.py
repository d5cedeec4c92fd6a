"""Any dynamic loss scale, and its course worked out in exponents of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mpcore
from hypothesis import strategies as st


@st.composite
def dynamic_scales(draw: st.DrawFn) -> mpcore.DynamicLossScale:
    """Draws bounds over the whole range, factors up to 2^40 and short intervals."""
    low, init, high = sorted(draw(st.tuples(*[st.integers(-126, 126)] * 3)))
    return mpcore.DynamicLossScale(
        init=2.0**init,
        min_scale=2.0**low,
        max_scale=2.0**high,
        growth_factor=2.0 ** draw(st.integers(1, 40)),
        backoff_factor=2.0 ** -draw(st.integers(1, 40)),
        growth_interval=draw(st.integers(1, 4)),
        hysteresis=draw(st.integers(1, 3)),
        refill=draw(st.sampled_from(["growth", "clean", "clean_or_backoff"])),
    )


def expected_scales(rule: mpcore.DynamicLossScale, overflows: Sequence[bool]) -> list[float]:
    """Returns the scale after each step, by the rule that its docstring states."""
    exponent = {
        name: int(math.log2(getattr(rule, name)))
        for name in ("init", "min_scale", "max_scale", "growth_factor", "backoff_factor")
    }
    now, clean, budget, course = exponent["init"], 0, rule.hysteresis, []
    for overflow in overflows:
        if overflow:
            clean, budget = 0, budget - 1
            if budget <= 0:
                now = max(now + exponent["backoff_factor"], exponent["min_scale"])
                if rule.refill == "clean_or_backoff":
                    budget = rule.hysteresis
        else:
            clean += 1
            if rule.refill in ("clean", "clean_or_backoff"):
                budget = rule.hysteresis
            if clean == rule.growth_interval:
                now = min(now + exponent["growth_factor"], exponent["max_scale"])
                clean, budget = 0, rule.hysteresis
        course.append(2.0**now)
    return course
