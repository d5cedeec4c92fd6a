"""A reading: what the gradients of one step look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpcore.monitoring.findings import HIGHEST, LOWEST, Finding
from mpcore.monitoring.memory import Resident
from mpcore.monitoring.report import plain


@dataclass(frozen=True)
class Reading:
    """Statistics of one step; everything unscaled but the histogram.

    Attributes:
        step: Counted from 0.
        loss_scale: Of the step.
        skipped: Whether it was skipped.
        loss: Before scaling; None if nobody knows.
        grad_norm: 2-norm of all gradients, before clipping.
        headroom_bits: Doublings of the scale before the first gradient overflows; None if there are
            none but zeros.
        zeros: Share of gradient values that are 0.
        subnormal: Share that is subnormal in its 16-bit format.
        flushed: Estimated share that was too small for it: see `estimated_flushed`.
        histogram: Values by exponent before unscaling, of all 16-bit gradients, from 2^-24 up to
            2^15, the range of float16; what is outside counts at the ends.
        lost_updates: Share of the changed masters whose update a 16-bit weight without one would
            have lost, from at most 4,096 of each parameter; None if no master changed.
        saturated: Weights clamped to the largest finite number so far.
        findings: The gradients one by one, in the order of the parameters.
        memory: Bytes of weights, gradients, masters and moments that were there.
    """

    step: int
    loss_scale: float
    skipped: bool
    loss: float | None
    grad_norm: float
    headroom_bits: float | None
    zeros: float
    subnormal: float
    flushed: float
    histogram: tuple[int, ...]
    lost_updates: float | None
    saturated: int
    findings: tuple[Finding, ...]
    memory: Resident | None = None

    def numbers(self) -> dict[str, float]:
        """Returns the single numbers by name, for loggers: `wandb.log(reading.numbers())`."""
        names = (
            *("loss_scale", "loss", "grad_norm", "headroom_bits", "zeros", "subnormal"),
            *("flushed", "lost_updates", "saturated"),
        )
        found = {name: getattr(self, name) for name in names}
        return {name: float(value) for name, value in found.items() if value is not None}

    def at_scale(self, doublings: int) -> tuple[float, float]:
        """Returns which shares of values that are not 0 would be lost and infinite at 2^k times.

        Exact for what the histogram holds: a power of two moves every exponent by as much. Values
        that are lost already are in no bin.

        Args:
            doublings: k, negative for a lower scale.

        Example:
            >>> reading = Reading(0, 1.0, False, None, 1.0, None, 0.0, 0.0, 0.0,
            ...                   (1, *[0] * 38, 1), None, 0, ())
            >>> reading.at_scale(0), reading.at_scale(1), reading.at_scale(-1)
            ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0))
        """
        total = sum(self.histogram) or 1
        lost = sum(n for i, n in enumerate(self.histogram) if LOWEST + i + doublings < LOWEST)
        over = sum(n for i, n in enumerate(self.histogram) if LOWEST + i + doublings > HIGHEST)
        return lost / total, over / total

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers and strings; what is not finite becomes a string, as JSON wants."""
        return {"kind": "reading", **plain(asdict(self))}


def summed_up(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the parts of a reading that follow from its findings."""
    sizes = [_size(finding) for finding in findings]
    total = max(sum(sizes), 1)
    bins = [0] * (HIGHEST - LOWEST + 1)
    small, subnormal = 0, 0.0
    for finding, size in zip(findings, sizes, strict=True):
        if finding.dtype == "float32":
            continue
        small += size
        subnormal += (finding.subnormal or 0.0) * size
        if finding.dtype == "float16":
            bins = [a + b for a, b in zip(bins, finding.histogram or bins, strict=True)]
    rooms = [finding.headroom_bits for finding in findings if finding.headroom_bits is not None]
    zeros = sum((f.zeros or 0.0) * size for f, size in zip(findings, sizes, strict=True))
    return {
        "headroom_bits": min(rooms, default=None),
        "zeros": zeros / total,
        "subnormal": subnormal / max(small, 1),
        "flushed": estimated_flushed(bins) / max(small, 1),
        "histogram": tuple(bins),
    }


def _size(finding: Finding) -> int:
    size = 1
    for length in finding.shape:
        size *= length
    return size


def estimated_flushed(histogram: Sequence[int]) -> float:
    """Returns about how many values were smaller than the first bin holds.

    Nobody can count what became 0: a 0 may be one from the start. If the counts of the three lowest
    exponents fall towards small ones by a factor r each, another r / (1 - r) of the first bin lie
    below it. An estimate, and at most as much as is in these three bins.

    Args:
        histogram: Counts of exponents, lowest first.

    Example:
        >>> estimated_flushed([10, 20, 40])
        10.0
        >>> estimated_flushed([0, 5, 5])
        0.0
    """
    first, _, third = histogram[:3]
    if not first:
        return 0.0
    ratio = (first / third) ** 0.5 if third else 1.0
    below = first * ratio / (1 - ratio) if ratio < 1 else float("inf")
    return min(below, float(sum(histogram[:3])))
