"""A reading: what the gradients of one step look like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpcore.monitoring.findings import HIGHEST, LOWEST, Figures, Finding, FindingTable
from mpcore.monitoring.memory import Resident
from mpcore.monitoring.report import as_dict, plain


@dataclass(frozen=True)
class Reading:
    """Statistics of one step; everything unscaled but the histogram.

    With several ranks all but `step`, `loss_scale` and `skipped` is of what this rank holds: its
    shards, its stage, its copies. `skipped` is what all ranks have agreed on. With
    `Monitor(..., over_ranks=True)` it is of all ranks together, what several hold counting once:
    `loss` is the mean of those that ranks know; `lost_updates`, `saturated` and `memory` stay those
    of the rank.

    Attributes:
        step: Counted from 0.
        loss_scale: Of the step.
        skipped: Whether it was skipped.
        loss: Before scaling, the sum of those of its backward passes; None if nobody knows.
        grad_norm: 2-norm of all gradients that this rank holds, before clipping.
        headroom_bits: Doublings of the scale before the first gradient overflows; None if there are
            none but zeros.
        zeros: Share of gradient values that are 0; None if nobody counted.
        subnormal: Share of 16-bit values that are subnormal in their format; None likewise, and if
            there are none.
        flushed: Estimated share of them that was too small: see `estimated_flushed`; None likewise,
            and if all are 0, so that nobody knows.
        histogram: Values by exponent before unscaling, of all 16-bit gradients, from 2^-24 up to
            2^15, the range of float16; what is outside counts at the ends.
        lost_updates: Share of the changed masters whose update a 16-bit weight without one would
            have lost, from at most 4,096 of each parameter; None if no master changed, or with
            masters="none", whose weights are rounded at random and so lose none on average.
        saturated: Weights clamped to the largest finite number so far.
        findings: The gradients one by one, in the order of the parameters.
        memory: Bytes of weights, gradients, sums, masters and moments that were there.
        largest_loss: The largest of the losses of its backward passes; None if nobody knows.
        passes: How many of them there were, as far as losses were seen.
        rank: Whose numbers these are, if there are several.
        ranks: Of how many ranks together they are.
        activations: What modules returned in the passes of the step, one by one; empty if nobody
            watched them.
    """

    step: int
    loss_scale: float
    skipped: bool
    loss: float | None
    grad_norm: float
    headroom_bits: float | None
    zeros: float | None
    subnormal: float | None
    flushed: float | None
    histogram: tuple[int, ...]
    lost_updates: float | None
    saturated: int
    findings: Sequence[Finding]
    memory: Resident | None = None
    largest_loss: float | None = None
    passes: int = 1
    rank: int | None = None
    ranks: int = 1
    activations: Sequence[Finding] = ()

    def numbers(self) -> dict[str, float]:
        """Returns the single numbers by name, for loggers: `wandb.log(reading.numbers())`."""
        names = (
            *("loss_scale", "loss", "grad_norm", "headroom_bits", "zeros", "subnormal"),
            *("flushed", "lost_updates", "saturated", "largest_loss"),
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
        return {"kind": "reading", **plain(as_dict(self))}


def summed_up(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the parts of a reading that follow from its findings.

    Gradients of several passes that were added up count as often as there were passes.

    Example:
        >>> summed_up([Finding("w", (2,), "float32", (), None, 1.0, 1.0, None)])["zeros"] is None
        True
    """
    figures, bins = _figures_of(findings)
    counted = [one for one in figures if one[2] is not None]
    narrow = [one for one in counted if one[0] != "float32"]
    total, small = (sum(values for _, values, *_ in some) for some in (counted, narrow))
    zeros = sum((share or 0.0) * values for _, values, share, _, _ in counted)
    subnormal = sum((share or 0.0) * values for _, values, _, share, _ in narrow)
    lost = None if bins is None else estimated_flushed(bins)
    rooms = [room for *_, room in figures if room is not None]
    return {
        "headroom_bits": min(rooms, default=None),
        "zeros": zeros / total if total else None,
        "subnormal": subnormal / small if small else None,
        "flushed": None if lost is None else lost / small,
        "histogram": tuple(bins or [0] * (HIGHEST - LOWEST + 1)),
    }


def _figures_of(findings: Sequence[Finding]) -> tuple[list[Figures], list[int] | None]:
    """Returns the numbers of findings, and the sum of the histograms of those in float16."""
    if isinstance(findings, FindingTable):
        return findings.figures(), findings.histogram()
    figures: list[Figures] = [
        (one.dtype, _values(one), one.zeros, one.subnormal, one.headroom_bits) for one in findings
    ]
    histograms = [one.histogram for one in findings if one.dtype == "float16" and one.histogram]
    return figures, [sum(counts) for counts in zip(*histograms, strict=True)] or None


def _values(finding: Finding) -> int:
    return math.prod(finding.shape) * finding.passes


def estimated_flushed(histogram: Sequence[int]) -> float | None:
    """Returns about how many values were smaller than the first bin holds.

    Nobody can count what became 0: a 0 may be one from the start. If the counts of the three lowest
    exponents fall towards small ones by a factor r each, another r / (1 - r) of the first bin lie
    below it. An estimate, and at most as much as is in these three bins. None if there are no
    values in any bin: then all may have become 0, or none.

    Args:
        histogram: Counts of exponents, lowest first.

    Example:
        >>> estimated_flushed([10, 20, 40])
        10.0
        >>> estimated_flushed([0, 5, 5])
        0.0
        >>> estimated_flushed([0, 0, 0]) is None
        True
    """
    if not any(histogram):
        return None
    first, _, third = histogram[:3]
    if not first:
        return 0.0
    ratio = (first / third) ** 0.5 if third else 1.0
    below = first * ratio / (1 - ratio) if ratio < 1 else float("inf")
    return min(below, float(sum(histogram[:3])))
