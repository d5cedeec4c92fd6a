"""What is known about a skipped step, and what follows from it at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from mpcore.loss_scale import LossScale
from mpcore.monitoring.findings import Finding

#: clean steps at a scale, or a higher one, after which an overflow there is unusual
PROVEN = 100
#: the least that proves something, and enough where the scale has never grown
FEW = 20
#: an outlier among losses: so many times the median, and above all, of the last so many that are
#: known; fewer than the least say nothing
_TIMES, _LAST, _LEAST = 8, 32, 5


class PassLoss(NamedTuple):
    """The loss of a backward pass, before scaling.

    Attributes:
        name: That of `add_loss`; "" is the optimizer's own.
        value: None if nobody knows it.
    """

    name: str
    value: float | None


@dataclass(frozen=True)
class Past:
    """A step, as it was.

    Attributes:
        scale: The loss scale of it.
        skipped: Whether it was skipped.
        norm: Of its gradients, unscaled.
        losses: Of its backward passes, in order; empty if nobody knows of any.

    Example:
        >>> past = Past(8.0, False, 1.0, (PassLoss("", 0.5), PassLoss("", -2.0)))
        >>> past.loss, past.largest_loss
        (-1.5, -2.0)
    """

    scale: float
    skipped: bool
    norm: float
    losses: tuple[PassLoss, ...] = ()

    @property
    def loss(self) -> float | None:
        """The sum of the losses, None if one is not known."""
        values = [one.value for one in self.losses]
        known = [value for value in values if value is not None]
        return sum(known) if known and len(known) == len(values) else None

    @property
    def largest_loss(self) -> float | None:
        """The loss of the largest magnitude, one that is not finite before all; None likewise."""
        if self.loss is None:
            return None
        values = [one.value for one in self.losses if one.value is not None]
        return max(values, key=lambda value: abs(value) if math.isfinite(value) else math.inf)

    def knows(self, name: str) -> bool:
        """Returns whether a loss of a name is known."""
        return any(one.name == name and one.value is not None for one in self.losses)

    def size_of(self, name: str) -> float | None:
        """Returns the largest finite magnitude of the losses of a name, None if there is none."""
        values = [one.value for one in self.losses if one.name == name]
        sizes = [abs(value) for value in values if value is not None and math.isfinite(value)]
        return max(sizes, default=None)


@dataclass(frozen=True)
class Facts:
    """Everything that a verdict is based on.

    Attributes:
        findings: The gradients, in the order of the parameters.
        scaling: How the loss is scaled; None if somebody else's scale overflowed.
        scale: The loss scale of the step.
        next_scale: That of the next; None likewise.
        losses: Of the backward passes, before scaling; empty if nobody knows.
        past: Steps before, oldest first.
        clean_before: Steps before that were not skipped, also those that `past` has forgotten.
        bad_weights: Names of weights that are not finite.
        large_weights: Names of float16 weights of 2^15 and more.
        bad_buffers: Names of the model's buffers that something made not finite.
        overflowed: Numbers of the micro-batches whose gradients overflowed, if they were added up.
        micro_batches: How many were added up; 0 if none were.
        nan_since: The scale at which a `NanStreak` began that this step belongs to; None if none.
    """

    findings: Sequence[Finding]
    scaling: LossScale | None
    scale: float
    next_scale: float | None
    losses: Sequence[PassLoss]
    past: Sequence[Past]
    clean_before: int
    bad_weights: Sequence[str] = field(default=())
    large_weights: Sequence[str] = field(default=())
    bad_buffers: Sequence[str] = field(default=())
    overflowed: Sequence[int] = field(default=())
    micro_batches: int = 0
    nan_since: float | None = None

    def bad(self) -> list[str]:
        """Returns the names of gradients that are not finite."""
        return [finding.name for finding in self.findings if not finding.finite]

    def only_nan(self) -> bool:
        """Returns whether there is NaN, and nothing infinite."""
        return {kind for finding in self.findings for kind in finding.kinds} == {"NaN"}

    def proven(self) -> int:
        """Returns how many steps were clean at this scale or a higher one."""
        return sum(not past.skipped and past.scale >= self.scale for past in self.past)

    def has_grown(self) -> bool:
        """Returns whether the scale has ever grown, as far as `past` goes back."""
        scales = [past.scale for past in self.past] + [self.scale]
        return any(later > earlier for earlier, later in pairwise(scales))

    def lost(self) -> int | None:
        """Returns which backward pass was the first whose loss was not finite, None if none was."""
        for number, one in enumerate(self.losses):
            if one.value is not None and not math.isfinite(one.value):
                return number
        return None

    def spiked(self) -> int | None:
        """Returns which backward pass had the loss furthest above those of clean steps, if any did.

        Losses of one name are compared with each other, each step by its largest.
        """
        worst, most = None, 1.0
        for number, one in enumerate(self.losses):
            usual, sizes = self.usual_loss(one.name), self._sizes(one.name)
            if usual is None or one.value is None or not math.isfinite(one.value):
                continue
            bound = max(_TIMES * usual, sizes[-1])
            excess = abs(one.value) / bound if bound else math.inf
            if abs(one.value) > bound and (worst is None or excess > most):
                worst, most = number, excess
        return worst

    def usual_loss(self, name: str = "") -> float | None:
        """Returns the median magnitude of the last losses of a name, None if too few are known."""
        sizes = self._sizes(name)
        return sizes[len(sizes) // 2] if len(sizes) >= _LEAST else None

    def largest_loss(self) -> float | None:
        """Returns the largest magnitude of the losses of this step, None if one is not known."""
        largest = Past(self.scale, True, math.inf, tuple(self.losses)).largest_loss
        return None if largest is None else abs(largest)

    def loss_of(self, number: int) -> str:
        """Returns how the loss of a backward pass is called, for a sentence."""
        name, count = self.losses[number].name, len(self.losses)
        text = f"the loss {name!r}" if name else "the loss"
        return f"{text} of micro-batch {number} of {count}" if count > 1 else text

    def where(self) -> str:
        """Returns in which micro-batches gradients overflowed, for a sentence; "" if in all."""
        if not 0 < len(self.overflowed) < self.micro_batches:
            return ""
        numbers = ", ".join(map(str, self.overflowed[:3]))
        more = len(self.overflowed) - 3
        rest = f" and {more} more" if more > 0 else ""
        return f" in micro-batch {numbers}{rest} of {self.micro_batches}"

    def _sizes(self, name: str) -> list[float]:
        clean = [past for past in self.past if not past.skipped and past.knows(name)]
        found = [past.size_of(name) for past in clean[-_LAST:]]
        return sorted(size for size in found if size is not None)


class NanStreak:
    """Skipped steps in a row in which the very same gradients were NaN alone, and others finite.

    A search for the loss scale has fewer of them from scale to scale, and infinities at the end.

    Example:
        >>> bias = Finding("b", (1,), "float16", ("NaN",), (0,), math.nan, None, None)
        >>> weight = Finding("w", (1,), "float16", (), None, 1.0, 1.0, None)
        >>> streak = NanStreak()
        >>> [streak.since(step, 2.0**-step, [bias, weight]) for step in range(3)]
        [1.0, 1.0, 1.0]
        >>> streak.since(3, 2.0**-3, [weight, weight])
    """

    def __init__(self) -> None:
        self._step = -1
        self._names: list[str] = []
        self._scale = 0.0

    def since(self, step: int, scale: float, findings: Sequence[Finding]) -> float | None:
        """Notes a skipped step; returns the scale of the first one like it, None if it is none."""
        bad = [finding for finding in findings if not finding.finite]
        alone = 0 < len(bad) < len(findings) and all(one.kinds == ("NaN",) for one in bad)
        names = [finding.name for finding in bad] if alone else []
        if names != self._names or step != self._step + 1:
            self._scale = scale
        self._step, self._names = step, names
        return self._scale if alone else None
