"""Bytes per parameter that a step moves to and from memory: stated, not measured.

Counted from the algorithm: each pass over data that does not fit a cache reads its inputs and
writes its outputs once. The sum is written out, so that it can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What each pass of a step moves.

    Attributes:
        passes: (name, bytes per parameter), in order; empty if it is not stated.

    Example:
        >>> Traffic((("norm", 2), ("update", 28))).total
        30.0
    """

    passes: tuple[tuple[str, float], ...] = ()

    @property
    def total(self) -> float | None:
        """All passes; None if it is not stated."""
        return float(sum(moved for _, moved in self.passes)) if self.passes else None

    def __str__(self) -> str:
        if not self.passes:
            return "not stated"
        return " + ".join(f"{name} {moved:g}" for name, moved in self.passes)


# fused AdamW in FP32 reads weight, gradient and two moments and writes all but the gradient
_FUSED_ADAMW = ("AdamW", 28)
# decay 8, lerp 12, v * beta2 8, addcmul 12, sqrt 8, divide 8, add eps 8, addcdiv 16
_FOREACH_ADAMW = ("AdamW in 8 passes", 80)
_AMP = (("unscale", 8), ("norm", 4), ("clip", 8))

MPCORE_FUSED = Traffic((("inspect", 2), ("update", 28)))
MPCORE_READ = Traffic((("inspect", 2), ("count", 2), ("update", 28)))
# the update reads the weight, to compare it with its rounded master
MPCORE_ALWAYS = Traffic((("inspect", 2), ("update", 30)))
MPCORE_GENERAL = Traffic((("inspect", 2), ("unscale", 6), _FUSED_ADAMW, ("cast", 6)))
AMP_FUSED = Traffic((*_AMP, _FUSED_ADAMW))
AMP_FOREACH = Traffic((*_AMP, _FOREACH_ADAMW))
MASTERS_LOOP = Traffic((("widen", 6), *_AMP, _FUSED_ADAMW, ("cast", 6)))
NOT_STATED = Traffic()
