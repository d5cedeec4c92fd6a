"""What is known about a skipped step, and what follows from it at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mpcore.loss_scale import LossScale
from mpcore.monitoring.findings import Finding

#: clean steps at a scale, or a higher one, after which an overflow there is unusual
PROVEN = 100
#: the least that proves something, and enough where the scale has never grown
FEW = 20
#: an outlier among losses: so many times the median, and above all, of the last so many that are
#: known; fewer than the least say nothing
_TIMES, _LAST, _LEAST = 8, 32, 5


@dataclass(frozen=True)
class Past:
    """An earlier step.

    Attributes:
        scale: The loss scale of it.
        skipped: Whether it was skipped.
        norm: Of its gradients, unscaled.
    """

    scale: float
    skipped: bool
    norm: float


@dataclass(frozen=True)
class Facts:
    """Everything that a verdict is based on.

    Attributes:
        findings: The gradients, in the order of the parameters.
        scaling: How the loss is scaled; None if somebody else's scale overflowed.
        scale: The loss scale of the step.
        next_scale: That of the next; None likewise.
        loss: The loss before it was scaled; None if nobody knows.
        past: Steps before, oldest first.
        clean_before: Steps before that were not skipped, also those that `past` has forgotten.
        bad_weights: Names of weights that are not finite.
        large_weights: Names of float16 weights of 2^15 and more.
        bad_buffers: Names of the model's buffers that something made not finite.
        clean_losses: Known losses of the steps of `past` that were not skipped.
        nan_since: The scale at which a `NanStreak` began that this step belongs to; None if none.
    """

    findings: Sequence[Finding]
    scaling: LossScale | None
    scale: float
    next_scale: float | None
    loss: float | None
    past: Sequence[Past]
    clean_before: int
    bad_weights: Sequence[str] = field(default=())
    large_weights: Sequence[str] = field(default=())
    bad_buffers: Sequence[str] = field(default=())
    clean_losses: Sequence[float] = field(default=())
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

    def usual_loss(self) -> float | None:
        """Returns the median magnitude of the last losses, None if too few are known."""
        sizes = self._sizes()
        return sizes[len(sizes) // 2] if len(sizes) >= _LEAST else None

    def loss_is_an_outlier(self) -> bool:
        """Returns whether the loss is finite and far above what it was in clean steps."""
        usual = self.usual_loss()
        if usual is None or self.loss is None or not math.isfinite(self.loss):
            return False
        return abs(self.loss) > max(_TIMES * usual, self._sizes()[-1])

    def _sizes(self) -> list[float]:
        return sorted(abs(loss) for loss in self.clean_losses[-_LAST:] if math.isfinite(loss))


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
